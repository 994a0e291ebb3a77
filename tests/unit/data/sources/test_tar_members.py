"""Tars as people have them: cut, joined, padded, damaged, with links; and their labels."""

import contextlib
import gzip
import io
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from lightship.data.manifest import Manifest
from lightship.data.sample_decoder import decode_all
from lightship.data.sources import layouts
from lightship.errors import DataError
from tests.support import images
from tests.support.images import little_set, put

FILES = little_set(("train",))
SAMPLES = len(FILES)
TAR = images.tarred(FILES)
SHARD = images.webdataset(FILES, shard_size=99)["train-000.tar"]
MEMBERS_END = max(i + 1 for i, byte in enumerate(TAR) if byte) + 511 & ~511
PNG = FILES["train/ant/000.png"]


def scanned(tmp_path: Path, data: bytes) -> Manifest:
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    return layouts.scan(str(path))["train"]


# ---- the end of a tar --------------------------------------------------------------------------


def test_a_cut_tar_is_refused_wherever_it_is_cut(tmp_path):
    rng = random.Random(0)
    cuts = [*range(512, MEMBERS_END + 1, 512), *(rng.randrange(MEMBERS_END) for _ in range(60))]
    for cut in cuts:
        for data in (TAR[:cut], gzip.compress(TAR[:cut], 1)):
            with pytest.raises(DataError, match="not a whole tar"):
                scanned(tmp_path, data)
    for cut in (MEMBERS_END + 1024, MEMBERS_END + 3000, len(TAR)):
        assert len(scanned(tmp_path, TAR[:cut])) == SAMPLES


def test_a_cut_gzip_is_refused_wherever_it_is_cut(tmp_path):
    packed, rng = gzip.compress(TAR, 1), random.Random(0)
    for cut in [len(packed) - 1, len(packed) - 9, *(rng.randrange(len(packed)) for _ in range(40))]:
        with pytest.raises(DataError):
            scanned(tmp_path, packed[:cut])


@pytest.mark.parametrize(
    ("end", "words"),
    {
        "one block of zeros": (bytes(512), "one block of zeros"),
        "garbage after the end": (bytes(1024) + b"<html>", "is not used"),
        "garbage after the padding": (bytes(20480) + b"<html>" * 999, "is not used"),
    }.values(),
)
def test_an_odd_end_is_named_and_every_member_used(tmp_path, end, words, caplog):
    assert len(scanned(tmp_path, TAR[:MEMBERS_END] + end)) == SAMPLES
    assert re.search(words, caplog.text)


@pytest.mark.parametrize("padding", [1024, 10240, 2**20])
def test_padding_of_zeros_is_no_fault(tmp_path, padding, caplog):
    assert len(scanned(tmp_path, TAR[:MEMBERS_END] + bytes(padding))) == SAMPLES
    assert not caplog.messages


@pytest.mark.parametrize(
    ("data", "words"),
    {
        "cat": (TAR + TAR, "another tar follows at byte"),
        "cat of gzips": (gzip.compress(TAR) + gzip.compress(TAR), "another tar follows"),
        "a file made as large as it will be": (TAR[:MEMBERS_END] + bytes(2**21), "incomplete"),
        "a damaged header": (TAR[:1024] + b"x" * 512 + TAR[1536:], "no header at byte"),
    }.values(),
)
def test_what_may_hide_members_is_refused(tmp_path, data, words):
    with pytest.raises(DataError, match=words):
        scanned(tmp_path, data)


def test_damaged_bytes_never_lose_a_sample_silently(tmp_path, caplog):
    """Bytes at random, a third of them with the header's checksum made right again."""
    rng = random.Random(1)
    for turn in range(200):
        data = bytearray(SHARD)
        place = rng.randrange(SAMPLES * 2) * 1024 + rng.randrange(512)
        data[place] = rng.choice([0, 0xFF, 0x80, 0x30, rng.randrange(256)])
        if turn % 3 == 0:
            header = data[place // 512 * 512 :][:512]
            header[148:156] = b" " * 8
            data[place // 512 * 512 + 148 :][:8] = b"%06o\0 " % sum(header)
        caplog.clear()
        with contextlib.suppress(DataError):
            assert len(scanned(tmp_path, bytes(data))) == SAMPLES or caplog.messages


# ---- links -------------------------------------------------------------------------------------


def linked(files: dict[str, bytes], links: dict[str, str], kind: bytes = tarfile.SYMTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, target in links.items():
            member = tarfile.TarInfo(path)
            member.type, member.linkname = kind, target
            tar.addfile(member)
        for path, data in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


PIXELS = {name: images.pixels_of(FILES[f"train/{name}/000.png"]) for name in ("ant", "bee")}
ANT, BEE = FILES["train/ant/000.png"], FILES["train/bee/000.png"]
FOLLOWED: dict[str, bytes] = {
    "symbolic": linked({"t/a/0.png": ANT, "t/b/0.png": BEE}, {"t/a/1.png": "0.png"}),
    "symbolic, up": linked({".s/0.png": ANT, "t/b/0.png": BEE}, {"t/a/0.png": "../../.s/0.png"}),
    "to a hidden file": linked(
        {".store/77": ANT, "b/0.png": BEE}, {"a/0.png": "../.store/77", "a/1.png": "0.png"}
    ),
    "hard": linked({"./t/a/0.png": ANT, "./t/b/0.png": BEE}, {"./t/a/1.png": "./t/a/0.png"},
                   tarfile.LNKTYPE),
    "to a folder": linked({".s/0.png": ANT, ".s/1.png": ANT, "t/b/0.png": BEE}, {"t/a": "../.s"}),
    "to a folder that is a link": linked(
        {".s/0.png": ANT, "t/b/0.png": BEE}, {"t/a": "../.r/q", ".r": ".s2", ".s2/q": "../.s"}
    ),
}  # fmt: skip


FOLLOWED_COUNTS = dict.fromkeys(("symbolic", "hard", "to a hidden file", "to a folder"), 3)


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("case", FOLLOWED)
def test_links_within_a_tar_are_followed(tmp_path, case, gzipped):
    data = gzip.compress(FOLLOWED[case]) if gzipped else FOLLOWED[case]
    manifest = scanned(tmp_path, data)
    pixels, bad = decode_all(manifest)
    assert not bad.reasons
    names = [manifest.class_names[label] for label in manifest.label]
    assert set(names) == {"a", "b"}
    assert len(names) == FOLLOWED_COUNTS.get(case, 2)
    for name, image in zip(names, pixels, strict=True):
        np.testing.assert_array_equal(image, PIXELS["bee" if name == "b" else "ant"])


@pytest.mark.parametrize(
    ("links", "kind"),
    [
        ({"t/a/1.png": "gone.png"}, tarfile.SYMTYPE),
        ({"t/a/1.png": "/elsewhere/0.png"}, tarfile.SYMTYPE),
        ({"t/a/1.png": "../../../0.png"}, tarfile.SYMTYPE),
        ({"t/a/1.png": "2.png", "t/a/2.png": "1.png"}, tarfile.SYMTYPE),
        ({"t/a/1.png": "t/a/gone.png"}, tarfile.LNKTYPE),
        ({"t/a/1.png": ""}, tarfile.FIFOTYPE),
    ],
)
def test_a_link_that_leads_nowhere_is_an_unreadable_image(tmp_path, links, kind, caplog):
    data = linked({"t/a/0.png": ANT, "t/b/0.png": BEE}, links, kind)
    manifest = scanned(tmp_path, data)
    assert re.search(r"images in the tars cannot be read.*t/a/1\.png", caplog.text)
    assert len(manifest) == 2 + len(links)
    bad = decode_all(manifest, max_bad_fraction=0.6)[1].reasons
    assert sorted(bad) == list(range(1, 1 + len(links)))


def test_links_that_never_end_are_left_alone(tmp_path):
    data = linked({"t/a/0.png": ANT, "t/b/0.png": BEE}, {"t/a/up": "..", "t/b/here": "."})
    assert len(scanned(tmp_path, data)) == 2


def test_a_label_may_be_a_link(tmp_path, caplog):
    files = {"one.cls": b"1", "x.png": ANT, "y.png": BEE, "y.cls": b"0"}
    put(str(tmp_path), {"x.tar": linked(files, {"x.cls": "one.cls"})})
    assert layouts.scan(str(tmp_path / "x.tar"))["train"].label.tolist() == [1, 0]
    assert re.search(r"1 samples have a label and no image.*such as one", caplog.text)


def test_members_that_no_reader_takes_are_counted(tmp_path, caplog):
    more = {"train/ant/9.heic": PNG, "train/bee/9.HEIC": PNG, "train/bee/8.jxl": PNG}
    assert len(scanned(tmp_path, images.tarred({**FILES, **more}))) == SAMPLES
    assert re.search(r"not read: 2 \.heic files, 1 \.jxl file", caplog.text)


@pytest.mark.parametrize(
    "path", ["train/caf\xe9/0.png", "train/ant/\xe9.png", "\xe9/a.png", "\xe9.cls"]
)
@pytest.mark.parametrize("link", [False, True])
def test_names_that_are_not_utf_8_never_end_in_a_traceback(tmp_path, path, link, caplog):
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", encoding="latin-1", format=tarfile.GNU_FORMAT
    ) as tar:
        for name, data in {**FILES, path: PNG}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            if link and name == path:
                member.type, member.linkname, member.size = tarfile.SYMTYPE, "gone", 0
            tar.addfile(member, io.BytesIO(data))
    (tmp_path / "x.tar").write_bytes(buffer.getvalue())
    for scan in (layouts.scan, layouts.scan_images):
        said = caplog.messages
        try:
            scan(str(tmp_path / "x.tar"))
        except DataError as error:
            said.append(str(error))
        assert all(text.encode() for text in [*said, *caplog.messages]), "can be written to any log"


# ---- labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("member", "content", "label"),
    [
        ("cls", b"\xef\xbb\xbf1\r\n", "1"),
        ("cls", b"\xef\xbb\xbfcaf\xc3\xa9\n", "café"),
        ("json", b'\xef\xbb\xbf{"label": 1}', "1"),
        ("json", b'{"cls": "1"}', "1"),
        ("json", '{"label": "ant"}'.encode("utf-16"), "ant"),
    ],
)
def test_labels_as_editors_write_them(tmp_path, member, content, label):
    other = "0" if label == "1" else "x"
    files = {"a.png": ANT, f"a.{member}": content, "b.png": BEE, "b.cls": other.encode()}
    manifest = scanned(tmp_path, images.tarred(files))
    assert manifest.class_names[manifest.label[0]] == label


@pytest.mark.parametrize(
    ("member", "content", "words"),
    [
        ("cls", b"", "0 lines"),
        ("cls", b" \n", "0 lines"),
        ("cls", b"ant\nbee\n", "2 lines"),
        ("cls", b"caf\xe9", "not UTF-8"),
        ("cls", b"9" * 19, "2 different numbers up to 9999999999999999999"),
        ("cls", b"9" * 9999, "no class number"),
        ("cls", b"-" + b"9" * 19, "out of range"),
        ("json", b"[" * 100_000, "not JSON"),
        ("json", b'{"label": 1', "not JSON"),
        ("json", b'{"label": 1.5}', "neither a number nor text"),
        ("json", b'{"label": [1]}', "neither a number nor text"),
        ("json", b'{"label": 18446744073709551616}', "2 different numbers"),
        ("json", b'{"label": ' + b"9" * 999 + b"}", "no class number"),
        ("json", b"[1]", "no label for the sample a"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, member, content, words):
    files = {"a.png": ANT, f"a.{member}": content, "b.png": BEE, "b.cls": b"0"}
    with pytest.raises(DataError, match=words) as error:
        scanned(tmp_path, images.tarred(files))
    assert len(str(error.value)) < 400


def test_a_cls_counts_before_a_json_wherever_it_stands(tmp_path):
    files = {"a.json": b'{"label": 0}', "a.png": ANT, "a.cls": b"1", "b.png": BEE, "b.cls": b"0"}
    assert scanned(tmp_path, images.tarred(files)).label.tolist() == [1, 0]
