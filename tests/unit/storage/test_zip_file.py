"""Zips that are made to exhaust memory or time; honest ones: tests/contract."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightship import storage
from lightship.data.sample_reader import read_samples
from lightship.data.sources import layouts
from lightship.errors import DataError
from lightship.storage.bounds import MAX_ZIP_ENTRIES
from tests.support.bounded_child import call_each, refusals
from tests.support.images import little_set, tarred, zipped

FILES = little_set(("train",))
PNG = FILES["train/ant/000.png"]
ENTRY = struct.Struct("<4s6H3L5H2L")


def entry(name: bytes, size: int = 0, packed: int = 0, method: int = 8, at: int = 0) -> bytes:
    """An entry of a table of contents."""
    extra = b""
    if size >= 2**32:
        extra, size = struct.pack("<HHQ", 1, 8, size), 2**32 - 1
    head = ENTRY.pack(b"PK\1\2", 45, 45, 0x800, method, 0, 0, 0, packed, size,
                      len(name), len(extra), 0, 0, 0, 0, at)  # fmt: skip
    return head + name + extra


def local(name: bytes, content: bytes, size: int, method: int = 8) -> bytes:
    return struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0x800, method, 0, 0, 0, len(content), size,
                       len(name), 0) + name + content  # fmt: skip


def with_directory(content: bytes, directory: bytes, size: int | None = None, count: int = 9):
    size = len(directory) if size is None else size
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, len(content), 0)
    return content + directory + end


def one(name: bytes, content: bytes, size: int, method: int = 8) -> bytes:
    packed = entry(name, size, len(content), method)
    return with_directory(local(name, content, min(size, 2**32 - 1), method), packed)


def deflated(size: int) -> bytes:
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"".join(pack.compress(bytes(2**20)) for _ in range(size >> 20)) + pack.flush()


def packed_by(method: int, size: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive, archive.open("a/x.png", "w") as file:
        for _ in range(size >> 20):
            file.write(bytes(2**20))
    return buffer.getvalue()


def overlapping(count: int = 1000) -> bytes:
    kernel = deflated(2**27)
    names = [b"c%d/%d.png" % (i % 2, i) for i in range(count)]
    directory = b"".join(entry(name, 2**27, len(kernel)) for name in names)
    return with_directory(local(names[0], kernel, 2**27), directory)


def moved(data: bytes, to: int) -> bytes:
    """A zip whose first entry is said to be somewhere else."""
    buffer = io.BytesIO(data)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.infolist()[0].header_offset = to
        archive.writestr("more", b"")  # so that the table of contents is written again
    return buffer.getvalue()


HUGE = deflated(2**30)
SCANS: dict[str, Callable[[], bytes]] = {
    "no end": lambda: zipped(FILES)[:-30],
    "a table beyond its file": lambda: with_directory(b"", b"", 2**32 - 2),
    "a name of 65,535": lambda: with_directory(b"", entry(b"a/" * 32_767)),
    "a name that is not UTF-8": lambda: with_directory(b"", entry(b"a/\xff.png")),
    "a cut entry": lambda: with_directory(b"", entry(b"a/x.png")[:-3], count=1),
    "a cut extra field": lambda: with_directory(b"", entry(b"a/x.png", 2**40)[:-10] + b"\xc8" * 10),
    "an entry of 2^63 bytes": lambda: one(b"a/x.png", deflated(0), 2**63),
    "an entry beyond the end": lambda: with_directory(b"", entry(b"a/x.png", 9, 9, at=2**32 - 2)),
    "an entry at 2^63": lambda: moved(zipped(FILES), 2**63),
    "version 99": lambda: with_directory(b"", entry(b"a.png").replace(b"\x2d\0", b"\x63\0")),
}  # fmt: skip
READS: dict[str, Callable[[], bytes]] = {
    "deflated 1 GiB": lambda: one(b"a/x.png", HUGE, 2**30),
    "deflated 1 GiB, said to be 9": lambda: one(b"a/x.png", HUGE, 9),
    "deflated 9, said to be 2^40": lambda: one(b"a/x.png", deflated(0), 2**40),
    "stored, said to be 2 GiB": lambda: one(b"a/x.png", PNG, 2**31, 0),
    "bzip2": lambda: packed_by(zipfile.ZIP_BZIP2, 2**24),
    "lzma": lambda: packed_by(zipfile.ZIP_LZMA, 2**24),
    "1,000 overlapping entries": overlapping,
}


def scan(path: str) -> None:
    layouts.scan(path)


def read_all(path: str) -> list[str]:
    manifest = layouts.scan_images(path)
    return [str(data) for _, data in read_samples(manifest, np.arange(len(manifest)))
            if isinstance(data, DataError)]  # fmt: skip


def written(folder: Path, attacks: dict[str, Callable[[], bytes]]) -> dict[str, tuple[str]]:
    for name, data in attacks.items():
        (folder / f"{name}.zip").write_bytes(data())
    return {name: (f"{folder}/{name}.zip",) for name in attacks}


def test_tables_of_contents_that_attack(tmp_path):
    paths = written(tmp_path, SCANS)
    said = refusals(scan, paths, max_mib=200, max_s=60)
    assert "4096 bytes" in said["a name of 65,535"]
    assert all(str(tmp_path) in text for text in said.values())


def test_millions_of_entries(tmp_path):
    one_entry = entry(b"")
    directory = one_entry * (MAX_ZIP_ENTRIES + 1)
    (tmp_path / "x.zip").write_bytes(with_directory(b"", directory))
    with (tmp_path / "y.zip").open("wb") as file:
        file.truncate(2**30)
        file.seek(0, 2)
        file.write(with_directory(b"", b"", 2**30)[-22:])
    paths = {name: (f"{tmp_path}/{name}.zip",) for name in ("x", "y")}
    said = refusals(scan, paths, max_mib=600)
    assert f"at most {MAX_ZIP_ENTRIES}" in said["x"]
    assert "at most 536870912" in said["y"]


def test_entries_that_attack_are_bad_samples(tmp_path):
    outcomes = call_each(read_all, written(tmp_path, READS), max_mib=600)
    for name, outcome in outcomes.items():
        assert outcome.error is None, (name, outcome)
        assert len(outcome.result) == (1000 if "1,000" in name else 1), name
        assert all("x.png" in text or "c0/" in text or "c1/" in text for text in outcome.result)
    assert "unpacks from" in outcomes["deflated 1 GiB"].result[0]
    assert "method 12" in outcomes["bzip2"].result[0]
    assert "method 14" in outcomes["lzma"].result[0]
    assert "overlaps" in outcomes["1,000 overlapping entries"].result[0]


def test_names_are_never_paths_of_this_machine(tmp_path):
    victim = tmp_path / "victim.png"
    victim.write_bytes(b"secret")
    names = [f"/{victim}", f"a/../../../../../..{victim}", "C:\\b\\x.png", "c/\x1b[2J\n.png"]
    (tmp_path / "x.zip").write_bytes(zipped(dict.fromkeys(names, PNG)))
    manifest = layouts.scan_images(str(tmp_path / "x.zip"))
    assert len(manifest) == len(names)
    assert not any(file.startswith("/") or ".." in file.split("/") for file in manifest.files)
    assert {bytes(data) for _, data in read_samples(manifest, range(len(names)))} == {PNG}


@pytest.mark.parametrize("name", ["tar://::{}/x.tar", "tar://a::{}/x.tar"])
def test_a_tar_as_a_folder_is_read_by_the_same_headers(tmp_path, name):
    """fsspec's own reads a header of a negative size for ever."""
    data = bytearray(tarred({"a/x.png": PNG, "a/y.png": PNG}))
    (tmp_path / "x.tar").write_bytes(data)
    assert [file.size_bytes for file in storage.list_files(name.format(tmp_path))] == [len(PNG)] * 2
    data[124:136] = b"\xff" * 10 + b"\xfe\x00"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "y.tar").write_bytes(data)
    with pytest.raises(DataError, match="has the size -512"):
        storage.list_files(name.format(tmp_path).replace("x.tar", "y.tar"))


def test_a_name_may_end_in_a_backslash_where_slashes_separate(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("a/0.png", "a/1\\", "b/"):
            info = zipfile.ZipInfo(name)
            info.create_system = 3
            archive.writestr(info, PNG)
    (tmp_path / "x.zip").write_bytes(buffer.getvalue())
    files = storage.list_files(f"zip://::{tmp_path}/x.zip")
    assert [file.path for file in files] == ["a/0.png", "a/1\\"]


def test_an_entry_without_a_name_is_no_file(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
        unnamed = zipfile.ZipInfo("x")
        unnamed.filename = ""
        archive.writestr(unnamed, PNG)
    assert layouts.scan(str(path))["train"].files == sorted(FILES)
