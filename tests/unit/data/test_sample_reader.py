"""Bytes of samples: in the order asked for, checked, by few requests."""

import dataclasses
import errno
import gzip
import math
import os
import resource
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from lightship import storage
from lightship.data import sample_reader
from lightship.data.manifest import Manifest
from lightship.data.sample_decoder import decode_all
from lightship.data.sources import gzip_file, layouts
from lightship.data.sources.tar_members import read_members
from lightship.errors import ConfigError, DataError
from tests.support.images import bad_folder, encoded, little_set, parquet, put, tarred, zipped


@pytest.fixture
def folder(tmp_path) -> Path:
    put(str(tmp_path / "set"), little_set())
    return tmp_path / "set"


def bytes_of(manifest: Manifest, ids: list[int] | None = None) -> list[bytes | DataError]:
    ids = list(range(len(manifest))) if ids is None else ids
    got = list(sample_reader.read_samples(manifest, ids))
    assert [i for i, _ in got] == ids
    return [data for _, data in got]


def test_samples_come_in_the_order_of_the_ids(folder):
    files = little_set()
    manifest = layouts.scan(str(folder))["train"]
    ids = [11, 0, 5, 5, 1]
    assert bytes_of(manifest, ids) == [files[manifest.name(i)] for i in ids]


@pytest.mark.parametrize("container", ["tar", "tar.gz", "parquet"])
def test_order_of_the_ids_in_containers(tmp_path, container):
    files = little_set(("train",))
    if container == "parquet":
        put(str(tmp_path / "set"), parquet(files))
    else:
        put(str(tmp_path / "set"), {f"x.{container}": tarred(files, container == "tar.gz")})
    manifest = layouts.scan(str(tmp_path / "set"))["train"]
    ids = [11, 0, 5, 5, 1]
    assert bytes_of(manifest, ids) == [sorted(files.items())[i][1] for i in ids]


@pytest.fixture
def spans_read(monkeypatch) -> list[storage.Span]:
    """The spans asked of storage, which still reads them."""
    asked: list[storage.Span] = []
    really_read = storage.read_spans

    def read_spans(spans, on_error="raise"):
        asked.extend(spans)
        return really_read(spans, on_error)

    monkeypatch.setattr(storage, "read_spans", read_spans)
    return asked


def test_neighbours_in_a_tar_are_one_request(tmp_path, spans_read):
    put(str(tmp_path), {"x.tar": tarred(little_set(("train",)))})
    manifest = layouts.scan(str(tmp_path))["train"]
    assert len(bytes_of(manifest)) == 12
    assert len(spans_read) == 1


def test_requests_are_bounded_and_skip_wide_gaps(tmp_path, spans_read):
    blob = np.random.default_rng(0).integers(0, 256, 12 * 2**20, dtype=np.uint8).tobytes()
    put(str(tmp_path), {"blob": blob})
    length = 2**19
    manifest = Manifest(
        root=str(tmp_path),
        files=["blob"],
        file_index=np.zeros(22, dtype=np.int32),
        offset=np.array([i * length for i in range(20)] + [11 * 2**20, 11 * 2**20 + 100]),
        length=np.array([length] * 20 + [100, 100]),
        label=np.zeros(22, dtype=np.int64),
        crc32=np.full(22, -1),
        class_names=["0"],
        container="bytes",
        encoding="image",
    )
    got = bytes_of(manifest)
    for i, data in enumerate(got):
        assert data == blob[manifest.offset[i] : manifest.offset[i] + manifest.length[i]]
    assert [(s.end - s.start) / 2**20 for s in spans_read if s.end] == [8, 2, 200 / 2**20]


def test_bad_files_are_handed_out_as_errors_that_name_them(folder):
    manifest, bad = bad_folder(folder)
    for i, data in enumerate(bytes_of(manifest)):
        if i in bad:
            assert isinstance(data, DataError)
            assert f"train/ant/{i:03d}.png" in str(data)
            assert bad[i] in str(data)
        else:
            assert isinstance(data, bytes)


def test_of_a_truncated_tar_the_whole_samples_are_read(tmp_path):
    files = little_set(("train",))
    put(str(tmp_path), {"x.tar": tarred(files)})
    manifest = layouts.scan(str(tmp_path))["train"]
    cut = int(manifest.offset[9]) + 10
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:cut])
    got = bytes_of(manifest)
    assert got[:9] == [data for _, data in sorted(files.items())[:9]]
    assert all(isinstance(data, DataError) and "x.tar#" in str(data) for data in got[9:])


def test_a_damaged_gzip_makes_all_its_samples_bad(tmp_path):
    put(str(tmp_path), {"x.tgz": tarred(little_set(("train",)), gzipped=True)})
    manifest = layouts.scan(str(tmp_path))["train"]
    whole = (tmp_path / "x.tgz").read_bytes()
    for damaged in (whole[: len(whole) // 2], gzip.compress(b"short")):
        (tmp_path / "x.tgz").write_bytes(damaged)
        assert all(isinstance(data, DataError) for data in bytes_of(manifest))


def test_a_full_temporary_folder_is_no_fault_of_the_data(tmp_path, monkeypatch):
    put(str(tmp_path), {"x.tgz": tarred(little_set(("train",)), gzipped=True)})
    manifest = layouts.scan(str(tmp_path))["train"]
    monkeypatch.setattr(gzip_file, "_IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bounds = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, bounds[1]))
    try:
        with pytest.raises(ConfigError, match=rf"{tmp_path} cannot hold x\.tgz .*\d bytes.*TMPDIR"):
            bytes_of(manifest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, bounds)
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    assert not [
        link for link in links if os.path.islink(link) and str(tmp_path) in os.readlink(link)
    ]
    assert len(bytes_of(manifest)) == len(manifest)


def failing_mount(monkeypatch, times: float, number: int = errno.EIO) -> list[int]:
    """Let so many reads of open local files fail, as on a network mount; they are listed."""
    readv, failed = os.readv, list[int]()

    def read(descriptor, buffers):
        if len(failed) < times:
            failed.append(descriptor)
            raise OSError(number, os.strerror(number))
        return readv(descriptor, buffers)

    monkeypatch.setattr(os, "readv", read)
    return failed


CONTAINERS = {
    "x.tar": lambda: tarred(little_set(("train",))),
    "x.tgz": lambda: tarred(little_set(("train",)), gzipped=True),
    "x.zip": lambda: zipped(little_set(("train",))),
    "x.parquet": lambda: min(parquet(little_set(("train",)), per_file=99).values()),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_reads_that_fail_on_a_mount_are_tried_again(tmp_path, monkeypatch, name):
    put(str(tmp_path), {name: CONTAINERS[name]()})
    root = str(tmp_path / name)
    whole = bytes_of(layouts.scan(root)["train"])
    storage.registry._BACKENDS.clear()  # an open zip has read its directory
    failed = failing_mount(monkeypatch, 2, errno.ESTALE)
    manifest = layouts.scan(root)["train"]
    assert len(failed) == 2
    if name in ("x.tgz", "x.parquet"):
        failed.clear()
    assert bytes_of(manifest) == whole
    assert len(failed) == 2


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_mount_that_stays_away_is_no_damage(tmp_path, monkeypatch, name):
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "0.3")
    put(str(tmp_path), {name: CONTAINERS[name]()})
    manifest = layouts.scan(str(tmp_path / name))["train"]
    storage.registry._BACKENDS.clear()
    failing_mount(monkeypatch, math.inf)
    with pytest.raises(storage.StorageTimeout, match="Input/output error"):
        layouts.scan(str(tmp_path / name))
    if name != "x.tar":  # whose samples are read without it
        with pytest.raises(storage.StorageTimeout, match="Input/output error"):
            bytes_of(manifest)


def test_a_file_that_cannot_be_read_is_not_called_damaged(monkeypatch):
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "0.3")
    with pytest.raises(storage.StorageTimeout, match="Input/output error"):
        read_members("/proc/self/mem", False, "x.tar")  # whose first page gives EIO


def test_checksums_are_compared(tmp_path):
    put(str(tmp_path), {"x.zip": zipped(little_set(("train",)))})
    manifest = layouts.scan(str(tmp_path / "x.zip"))["train"]
    crc32 = manifest.crc32.copy()
    crc32[3] ^= 1
    got = bytes_of(dataclasses.replace(manifest, crc32=crc32))
    assert isinstance(got[3], DataError)
    assert "checksum" in str(got[3])
    assert [i for i, data in enumerate(got) if isinstance(data, DataError)] == [3]


def test_a_null_row_of_parquet_is_bad(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = encoded(np.zeros((20, 28, 3), np.uint8))
    rows = [{"bytes": good, "path": "a"}, {"bytes": None, "path": "b"}, None]
    pq.write_table(pa.table({"image": rows, "label": [0, 1, 1]}), tmp_path / "train.parquet")
    got = bytes_of(layouts.scan(str(tmp_path))["train"])
    assert got[0] == good
    assert all(isinstance(data, DataError) and "no image bytes" in str(data) for data in got[1:])


def test_storage_that_refuses_is_no_samples_fault():
    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        one = np.zeros(1, dtype=np.int64)
        manifest = Manifest(
            f"http://127.0.0.1:{server.server_port}", ["a.png"], one.astype(np.int32), one,
            one + 99, one, one - 1, ["0"], "bytes", "image")  # fmt: skip
        with pytest.raises(ConfigError, match="403"):
            decode_all(manifest, max_bad_fraction=1)
    finally:
        server.shutdown()
        server.server_close()
