"""Class and file names: checked at the scan, whatever the source; é has one form."""

import json
import os
import re
import unicodedata
from pathlib import Path

import pytest

from lightship.data.sources import layouts
from lightship.data.sources.build_manifests import build_manifests, build_unlabelled
from lightship.data.sources.file_names import suffix
from lightship.data.sources.parts import Found, Part
from lightship.errors import DataError
from tests.support import images
from tests.support.images import little_set, put

PNG = little_set(("train",))["train/ant/000.png"]
COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def found(labels: list, class_names: list | None = None) -> Found:
    count = len(labels)
    part = Part("train", ["x"], [0] * count, range(count), [1] * count, labels)
    return Found([part], class_names=class_names)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["ant", ""], "class 1 is empty"),
        (["ant", "  "], "class 1 is empty"),
        (["ant", None], "class 1 is None"),
        (["ant", True], "class 1 is True"),
        (["ant", "b\ud800"], r"b\ud800"),
        (["ant", "b\x00"], "control characters"),
        (["ant", "\x1b[31m"], "control characters"),
        (["ant", "bee", "ant"], "0 and 2 are both named 'ant'"),
        ([COMPOSED, DECOMPOSED], "0 and 1 are both named"),
    ],
)
def test_class_names_that_a_later_step_would_fail_on_are_refused(names, words):
    with pytest.raises(DataError) as error:
        build_manifests(found([0, 1], names), "root", "root")
    assert words in str(error.value)
    str(error.value).encode()


def test_class_names_of_labels_are_checked_too():
    with pytest.raises(DataError, match="control characters"):
        build_manifests(found(["a", "b\x07"]), "root", "root")


def test_integers_as_class_names_become_text():
    assert build_manifests(found([0, 1], [7, 9]), "root", "root")["train"].class_names == ["7", "9"]


@pytest.mark.parametrize("form", ["folders", "shards"])
def test_composed_and_decomposed_names_are_one_class(tmp_path, form):
    if form == "folders":
        paths = [f"train/{COMPOSED}/0", f"train/{DECOMPOSED}/1", f"test/{DECOMPOSED}/2"]
        files = {f"{path}.png": PNG for path in [*paths, "train/bee/3", "test/bee/4"]}
    else:
        files = {
            f"{split}.tar": images.tarred({
                "0.png": PNG, "0.json": json.dumps({"label": name}).encode(),
                "1.png": PNG, "1.json": b'{"label": "bee"}',
            })
            for split, name in (("train", COMPOSED), ("test", DECOMPOSED))
        }  # fmt: skip
    manifests = layouts.scan(put(str(tmp_path), files))
    for manifest in manifests.values():
        assert manifest.class_names == ["bee", COMPOSED]
    assert set(manifests) == {"train", "test"}
    if form == "folders":
        assert unicodedata.normalize("NFD", manifests["test"].files[1]) == f"{paths[2]}.png"
        assert manifests["test"].files[1] == f"{paths[2]}.png", "a file keeps its path"


@pytest.mark.parametrize("where", ["file", "folder"])
def test_names_that_are_not_utf8_are_refused_in_a_line(tmp_path, where):
    put(str(tmp_path), little_set(("train", "test")))
    here = os.fsencode(tmp_path)
    if where == "file":
        os.rename(here + b"/train/cat/000.png", here + b"/train/cat/caf\xe9.png")
    else:
        for split in (b"/train/", b"/test/"):
            os.rename(here + split + b"cat", here + split + b"caf\xe9")
    with pytest.raises(DataError, match=r"caf\\xe9") as error:
        layouts.scan(str(tmp_path))
    assert "UTF-8" in str(error.value)
    assert "\n" not in str(error.value)
    assert "caf\udce9" in "".join(layouts.scan_images(str(tmp_path)).files), "predict reads it"


def test_members_of_a_tar_that_are_not_utf8_are_predicted():
    part = Part("train", ["x.tar"], [0], [0], [1], [None], members=["caf\udce9.png"])
    assert build_unlabelled(Found([part]), "root", "root").members == ["caf\udce9.png"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [("a/b.PNG", "png"), ("set.v2/train/cat/png", ""), ("v1.0/x", ""), ("x.tar.gz", "gz")],
)
def test_the_suffix_is_of_the_name_alone(path, expected):
    assert suffix(path) == expected


def test_what_no_reader_takes_is_counted_in_one_line(tmp_path: Path, caplog):
    scanned = found(["a"])
    scanned.not_read = [f"x/{i}.HEIC" for i in range(3)] + [f"y.{i}" for i in range(9)]
    manifest = build_manifests(scanned, "root", "root")["train"]
    assert re.search(r"not read: 3 \.heic files, ", caplog.text)
    assert len(caplog.messages) == 1
    assert manifest.not_read.startswith("3 .heic files, 1 .0 file")
    assert manifest.not_read.endswith("5 of 5 other kinds")
