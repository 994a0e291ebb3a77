"""Parquet as the Hub and its users write it: names of classes, configurations, columns, damage."""

import io
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightship.data import sample_reader
from lightship.data.sample_decoder import decode_all
from lightship.data.sources import layouts
from lightship.data.sources.parquet_file import RowReader, open_parquet
from lightship.errors import DataError
from tests.support import images
from tests.support.images import little_set, put

FILES = little_set(("train",))
PNG = {name: FILES[f"train/{name}/000.png"] for name in ("ant", "bee", "cat")}
PIXELS = {images.pixels_of(data).tobytes(): name for name, data in PNG.items()}
NAMES = ["ant", "bee", "cat"]


def features(names: Any, **more: Any) -> dict[str, Any]:
    label = {"names": names, "_type": "ClassLabel"}
    return {"info": {"features": {"image": {"_type": "Image"}, "label": label, **more}}}


def table(
    rows: list[str] = NAMES, names: Any = NAMES, metadata: Any = None, **columns: Any
) -> bytes:
    """One file whose rows are the images of these classes; names None: labels are text."""
    labels = rows if names is None else [names.index(row) for row in rows]
    content: dict[str, Any] = {
        "image": [{"bytes": PNG[row], "path": row} for row in rows],
        "label": labels,
    }
    content = {name: value for name, value in (content | columns).items() if value is not None}
    made = pa.table(content)
    if metadata is None and names is not None:
        metadata = features(names)
    if metadata:
        raw = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
        made = made.replace_schema_metadata({"huggingface": raw})
    buffer = io.BytesIO()
    pq.write_table(made, buffer, row_group_size=2)
    return buffer.getvalue()


def classes_of(manifest: Any) -> list[tuple[str, str]]:
    """(the label's name, what the image shows) of every row."""
    pixels, bad = decode_all(manifest)
    assert not bad.reasons
    shown = [PIXELS[image.tobytes()] for image in pixels]
    return list(zip([manifest.class_names[x] for x in manifest.label], shown, strict=True))


def scanned(tmp_path: Path, files: dict[str, bytes]) -> Any:
    return layouts.scan(put(str(tmp_path / "set"), files))


# ---- names of classes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "words", "names"),
    {
        "another order": (
            {"train-0": table(), "train-1": table(names=["cat", "bee", "ant"])},
            "matched by name: 3 classes in all",
            NAMES,
        ),
        "another order in test": (
            {"train-0": table(), "test-0": table(names=["cat", "ant", "bee"])},
            r"train-0.parquet and test-0.parquet have different|test-0.parquet and train-0.parquet",
            None,
        ),
        "a name that only a later file has": (
            {"train-0": table(["ant", "bee"], ["ant", "bee"]), "train-1": table()},
            "matched by name: 3 classes in all",
            NAMES,
        ),
        "other names in each file": (
            {"train-0": table(["ant"], ["ant"]), "train-1": table(["cat", "bee"], ["bee", "cat"])},
            "3 classes",
            ["ant", "bee", "cat"],
        ),
        "text beside numbers": (
            {"train-0": table(), "train-1": table(names=None)},
            None,
            NAMES,
        ),
        "integers as names of none": (
            {"train-0": table(), "train-1": table(metadata={"info": None})},
            "train-1.parquet .1 such files. names no classes; its numbers are taken to mean the",
            NAMES,
        ),
        "an empty file": ({"train-0": table(), "train-1": table([], ["x"])}, None, NAMES),
    }.values(),
)
def test_labels_mean_the_same_in_every_file(tmp_path, files, words, names, caplog):
    manifests = scanned(tmp_path, {f"{name}.parquet": data for name, data in files.items()})
    for manifest in manifests.values():
        assert names is None or manifest.class_names == names
        assert all(label == shown for label, shown in classes_of(manifest))
    if words is None:
        assert not caplog.messages
    else:
        assert re.search(words, caplog.text)


def test_names_that_are_integers_become_text(tmp_path):
    manifest = scanned(tmp_path, {"train.parquet": table(metadata=features([7, 8, 9]))})["train"]
    assert manifest.class_names == ["7", "8", "9"]


HUB = b'{"info": {"features": '
NO_NAMES: dict[str, tuple[dict[str, bytes], str]] = {
    "not JSON": ({"a": table(metadata=b"{")}, "not JSON"),
    "not UTF-8": ({"a": table(metadata=b"\xff\xfe\x00")}, "not JSON"),
    "deeply nested": ({"a": table(metadata=b"[" * 100_000)}, "not JSON"),
    "a list": ({"a": table(metadata=b"[1]")}, "no table of features"),
    "info is text": ({"a": table(metadata={"info": "x"})}, "no table of features"),
    "features is a list": ({"a": table(metadata={"info": {"features": [1]}})}, "no table"),
    "names are text": ({"a": table(metadata=features("abc"))}, "not a list"),
    "names are a table": ({"a": table(metadata=features({"0": "ant"}))}, "not a list"),
    "a name is a list": ({"a": table(metadata=features([["ant"], "bee", "cat"]))}, "must be text"),
    "a name is null": ({"a": table(metadata=features([None, "bee", "cat"]))}, "must be text"),
    "a name is empty": ({"a": table(metadata=features(["", "bee", "cat"]))}, "is empty"),
    "a name twice": ({"a": table(metadata=features(["ant", "ant", "cat"]))}, "both named"),
    "a lone surrogate": (
        {"a": table(metadata=json.dumps(features(["\ud800", "b", "c"])).encode())}, "UTF-8"),
    "fewer names than labels": ({"a": table(metadata=features(["ant", "bee"]))}, "out of range"),
    "fewer in one of two lists": (
        {"a": table(), "b": table(metadata=features(["bee"]))}, "labels of train-b.*out of range"),
    "none where the others differ": (
        {"a": table(), "b": table(["ant"], ["ant"]), "c": table(metadata={"info": {}})},
        "train-c.parquet names no classes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_NAMES)
def test_damaged_names_are_refused(tmp_path, case):
    files, words = NO_NAMES[case]
    with pytest.raises(DataError, match=words) as error:
        scanned(tmp_path, {f"train-{name}.parquet": data for name, data in files.items()})
    assert len(str(error.value)) < 500


# ---- columns -----------------------------------------------------------------------------------


def test_the_column_that_is_taken_is_named_where_there_are_several(tmp_path, caplog):
    mask = [{"bytes": PNG["cat"], "path": None}] * 3
    more = {"coarse": {"names": ["x"], "_type": "ClassLabel"}}
    data = table(metadata=features(NAMES, **more), mask=mask, coarse=[0] * 3)
    reordered = pq.read_table(io.BytesIO(data)).select(["mask", "coarse", "image", "label"])
    pq.write_table(reordered, tmp_path / "x.parquet")
    manifest = layouts.scan(str(tmp_path / "x.parquet"))["train"]
    assert "images are taken from the column image, not from mask" in caplog.text
    assert "labels are taken from the column label, not from coarse" in caplog.text
    assert all(label == shown for label, shown in classes_of(manifest))


PLAIN = [PNG[name] for name in NAMES]
COLUMNS: dict[str, tuple[dict[str, Any], str]] = {
    "bytes are text": ({"image": [{"bytes": "x"}] * 3}, r"image \(struct<bytes: string>\)"),
    "bytes are a list": ({"image": [{"bytes": [1]}] * 3}, r"image \(struct<bytes: list"),
    "bytes are a struct": ({"image": [{"bytes": {"a": b"x"}}] * 3}, r"image \(struct<bytes: str"),
    "image is text": ({"image": ["x"] * 3}, r"image \(string\), label"),
    "image is a list": ({"image": [[1, 2]] * 3}, r"image \(list"),
    "labels are fractions": ({"label": [0.5] * 3}, "type double"),
    "labels are lists": ({"label": [[0]] * 3}, "type list"),
    "labels are bytes": ({"label": [b"0"] * 3}, "type binary"),
    "labels are true or false": ({"label": [True] * 3}, "type bool"),
    "labels are missing": ({"label": None}, "no column label"),
    "labels above int64": (
        {"label": pa.array([2**64 - 1, 0, 1], pa.uint64())}, "out of range, such as 18446744073"),
}  # fmt: skip


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_that_do_not_fit_are_refused(tmp_path, case):
    columns, words = COLUMNS[case]
    with pytest.raises(DataError, match=words):
        scanned(tmp_path, {"train.parquet": table(**columns)})


@pytest.mark.parametrize(
    "column", [PLAIN, pa.array(PLAIN, pa.large_binary()), pa.array([{"bytes": x} for x in PLAIN])]
)
@pytest.mark.parametrize("labels", [NAMES, pa.array(NAMES).dictionary_encode()])
def test_columns_of_other_types_that_hold_the_same(tmp_path, column, labels):
    files = {"train.parquet": table(names=None, image=column, label=labels)}
    assert classes_of(scanned(tmp_path, files)["train"]) == list(zip(NAMES, NAMES, strict=True))


@pytest.mark.parametrize("twice", ["image", "label"])
def test_two_columns_of_one_name_are_refused(tmp_path, twice):
    read_back = pq.read_table(io.BytesIO(table()))
    pq.write_table(read_back.append_column(twice, read_back[twice]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=f"2 columns called {twice}"):
        layouts.scan(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize("what", ["image", "label"])
def test_files_with_other_columns_are_refused(tmp_path, what):
    other = pq.read_table(io.BytesIO(table(metadata={"info": {}})))
    new = {"image": "picture", "label": "labels"}[what]
    buffer = io.BytesIO()
    pq.write_table(other.rename_columns({what: new}), buffer)
    with pytest.raises(DataError, match=f"are in the column {what}, those of .* in {new}"):
        scanned(tmp_path, {"train-0.parquet": table(), "train-1.parquet": buffer.getvalue()})


# ---- configurations ----------------------------------------------------------------------------

SEVERAL = {
    "as the Hub writes them": ["a/train-00000-of-00001", "b/train-00000-of-00001"],
    "of other splits": ["a/train-0", "b/test-0"],
    "beside data/": ["data/train-0", "data/test-0", "more/train-0"],
    "as the Hub converts them": ["a/train/0000", "b/train/0000"],
    "with a split's word in the name": ["test_a/train/0000", "test_b/train/0000"],
    "with a split's word before files": ["small_test/train-0", "small_test/test-0", "b/train-0"],
    "folders of one split": ["train_small/0000", "train_big/0000", "test/0000"],
    "without splits": ["a/0000", "b/0000"],
    "one of them at the root": ["train-0", "test-0", "more/train-0"],
    "deeper": ["x/a/train-0", "x/b/train-0"],
}


@pytest.mark.parametrize("case", SEVERAL)
def test_several_configurations_are_refused(tmp_path, case):
    files = {f"{path}.parquet": table() for path in SEVERAL[case]}
    with pytest.raises(DataError, match=r"set --data\.root to one of them") as error:
        scanned(tmp_path, files)
    chosen = str(error.value).partition("such as ")[2].partition(",")[0]
    assert layouts.scan(chosen), "the advice can be followed"


ONE = {
    "data/": ["data/train-00000-of-00002", "data/train-00001-of-00002", "data/validation-0"],
    "one configuration": ["a/train-0", "a/test-0"],
    "folders of splits": ["train/0000", "test/0000"],
    "folders of splits in one": ["a/partial-train/0000", "a/test/0000"],
    "splits named twice": ["train/train-0", "test/test-0"],
    "splits named in other ways": ["trainset/train-0", "testset/test-0"],
    "partitions": ["train/year=1/0", "train/year=2/0", "test/year=1/0"],
    "partitions without splits": ["year=1/0", "year=2/0"],
}


@pytest.mark.parametrize("case", ONE)
def test_one_configuration_is_read_whole(tmp_path, case, caplog):
    files = {f"{path}.parquet": table() for path in ONE[case]}
    manifests = scanned(tmp_path, files)
    assert not caplog.messages
    assert sum(map(len, manifests.values())) == 3 * len(files)


def test_files_whose_names_begin_differently_are_named(tmp_path, caplog):
    files = {f"data/{name}.parquet": table() for name in ("big-train-0", "small-train-0")}
    assert len(scanned(tmp_path, files)["train"]) == 6
    assert re.search("begin differently .big-, small-.; all of", caplog.text)


# ---- reading -----------------------------------------------------------------------------------


def test_a_reader_closes_its_file(tmp_path):
    (tmp_path / "x.parquet").write_bytes(table())
    (tmp_path / "wrong.parquet").write_bytes(table(image=["x"] * 3))

    def held() -> list[str]:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return [x for x in map(os.path.realpath, links) if x.startswith(str(tmp_path))]

    reader = RowReader(str(tmp_path / "x.parquet"))
    assert held()
    assert reader.read(0, 0) == PNG["ant"]
    reader.close()
    assert not held()
    layouts.scan(str(tmp_path / "x.parquet"))
    assert not held()
    with pytest.raises(DataError) as error:  # which keeps the frames, and so the file if it is open
        RowReader(str(tmp_path / "wrong.parquet"))
    assert not held()
    assert error


def test_damaged_bytes_end_in_an_error_of_the_data(tmp_path):
    data, rng = table(NAMES * 4), random.Random(0)
    path = tmp_path / "x.parquet"
    for _ in range(150):
        changed = bytearray(data)
        for place in rng.sample(range(len(data)), rng.randrange(1, 5)):
            changed[place] = rng.randrange(256)
        path.write_bytes(changed[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            manifest = layouts.scan(str(path))["train"]
        except DataError:
            continue
        got = [data for _, data in sample_reader.read_samples(manifest, range(len(manifest)))]
        assert all(isinstance(data, bytes | DataError) for data in got)


def test_an_index_beyond_the_names_is_damage(tmp_path: Path) -> None:
    """A label is a number into a table of names; pyarrow gives it as the file has it."""
    table = pa.table({"label": ["a", "b"] * 3, "image": [b"x"] * 6})
    whole, path = io.BytesIO(), tmp_path / "x.parquet"
    pq.write_table(table, whole, compression="none")
    reasons = []
    for place in range(len(whole.getvalue())):
        damaged = bytearray(whole.getvalue())
        damaged[place] ^= 0x80
        path.write_bytes(damaged)
        try:
            with open_parquet(str(path), "x.parquet") as opened:
                assert len(opened.labels("label")) == 6
        except DataError as error:
            reasons.append(str(error))
    assert any("out of bounds" in reason for reason in reasons)
