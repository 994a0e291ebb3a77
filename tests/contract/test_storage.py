"""Every kind of storage keeps the same promises."""

import abc
import dataclasses
import errno
import hashlib
import http.server
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from lightship import storage
from lightship.errors import ConfigError, DataError
from lightship.storage import (
    Denied,
    FileInfo,
    Limits,
    NotFound,
    ReadAhead,
    Span,
    StorageTimeout,
    api,
    local,
    registry,
)
from lightship.storage.fsspec_backend import Remote
from tests.support import plain_fs
from tests.support.s3 import KEYS, S3Server

TREE = {
    "empty": b"",
    "train/cat/1.jpg": bytes(range(256)) * 40,
    "train/cat/2.jpg": b"two",
    "train/a dog/ü #%+&=.jpg": b"odd name",
    "z": os.urandom(3000),
}


class ReadContract(abc.ABC):
    """Bound by a fixture `tree_url`: a place that holds TREE and nothing else."""

    @pytest.fixture
    @abc.abstractmethod
    def tree_url(self) -> object: ...

    def test_lists_all_files_sorted_with_sizes(self, tree_url: str) -> None:
        expected = [FileInfo(path, len(data)) for path, data in sorted(TREE.items())]
        assert storage.list_files(tree_url) == expected
        inner = storage.list_files(storage.join(tree_url, "train", "cat"))
        assert inner == [FileInfo("1.jpg", 10240), FileInfo("2.jpg", 3)]

    def test_lists_some_files_without_looking_for_all(self, tree_url: str) -> None:
        some = storage.list_files(tree_url, max_files=1)
        assert 1 <= len(some) < len(TREE)
        assert set(some) <= {FileInfo(path, len(data)) for path, data in TREE.items()}
        assert storage.list_files(storage.join(tree_url, "z"), max_files=1) == [FileInfo("", 3000)]

    def test_lists_a_single_file_as_itself(self, tree_url: str) -> None:
        assert storage.list_files(storage.join(tree_url, "train/cat/2.jpg")) == [FileInfo("", 3)]

    @pytest.mark.parametrize("name", ["nothing/here", "train/cat/2.jpgx", "train/ca"])
    def test_what_is_missing_is_not_found(self, tree_url: str, name: str) -> None:
        url = storage.join(tree_url, name)
        assert not storage.exists(url)
        for call in (storage.list_files, storage.size_bytes, storage.read_bytes):
            with pytest.raises(NotFound, match=r"not found|does not exist"):
                call(url)
        with pytest.raises(NotFound):
            storage.open_binary(url).read()

    def test_folders_exist_but_are_no_files(self, tree_url: str) -> None:
        url = storage.join(tree_url, "train/cat")
        assert storage.exists(url)
        for call in (storage.size_bytes, storage.read_bytes):
            with pytest.raises(NotFound):
                call(url)

    def test_reads_whole_files(self, tree_url: str) -> None:
        for path, data in TREE.items():
            url = storage.join(tree_url, path)
            assert storage.exists(url)
            assert storage.size_bytes(url) == len(data)
            assert storage.read_bytes(url) == data

    def test_reads_many_spans_in_their_order(self, tree_url: str) -> None:
        big, odd = (storage.join(tree_url, p) for p in ("z", "train/a dog/ü #%+&=.jpg"))
        spans = [Span(big, i * 29, i * 29 + 100) for i in range(100)]
        spans += [Span(odd), Span(big, 2990), Span(odd, 3, 3), Span(odd, 0, 3)]
        expected = [TREE["z"][i * 29 : i * 29 + 100] for i in range(100)]
        assert storage.read_spans(spans) == [*expected, b"odd name", TREE["z"][2990:], b"", b"odd"]
        assert storage.read_range(big, 10, 20) == TREE["z"][10:20]
        assert storage.read_spans([]) == []

    def test_reads_ahead_what_it_reads(self, tree_url: str) -> None:
        """Each twice: how a folder is reached is asked for once."""
        reads = ReadAhead()
        read = [(storage.join(tree_url, path), data) for path, data in TREE.items() if data] * 2
        futures = [reads.begin(Span(url, 1, len(data))) for url, data in read]
        assert len(set(reads.as_completed(futures))) == len(futures)
        for future, (_, data) in zip(futures, read, strict=True):
            assert reads.result(future) == data[1:]
        reads.close()

    def test_a_range_beyond_the_end_is_an_error(self, tree_url: str) -> None:
        url = storage.join(tree_url, "train/cat/2.jpg")
        for start, end in ((0, 4), (3, 4), (100, 200)):
            with pytest.raises(DataError, match="has 3 bytes"):
                storage.read_range(url, start, end)

    def test_errors_among_spans_are_raised_or_returned_never_data(self, tree_url: str) -> None:
        good, bad = (storage.join(tree_url, p) for p in ("train/cat/2.jpg", "gone"))
        spans = [Span(good), Span(bad), Span(good, 0, 9), Span(good, 1, 3)] * 5
        with pytest.raises((NotFound, DataError)):
            storage.read_spans(spans)
        results = storage.read_spans(spans, on_error="return")
        assert results[0::4] == [b"two"] * 5
        assert results[3::4] == [b"wo"] * 5
        assert {type(r) for r in results[1::4]} == {NotFound}
        assert {type(r) for r in results[2::4]} == {DataError}

    def test_opens_a_seekable_file(self, tree_url: str) -> None:
        with storage.open_binary(storage.join(tree_url, "z")) as file:
            assert file.read(10) == TREE["z"][:10]
            assert file.seek(-7, os.SEEK_END) == 2993
            assert file.read() == TREE["z"][-7:]
            assert file.read() == b""
            assert file.seek(5) == 5
            assert file.read(3) == TREE["z"][5:8]
            assert file.tell() == 8

    def test_downloads_whole_or_not_at_all(self, tree_url: str, tmp_path: Path) -> None:
        url, path = storage.join(tree_url, "z"), tmp_path / "new" / "z"
        right = hashlib.md5(TREE["z"]).hexdigest()
        with pytest.raises(DataError, match=f"(?s){right}.*{'0' * 32}"):
            storage.download(url, path, md5="0" * 32)
        assert list(path.parent.iterdir()) == []
        storage.download(url, path, md5=right)
        assert path.read_bytes() == TREE["z"]
        assert list(path.parent.iterdir()) == [path]


class StorageContract(ReadContract):
    """Bound by a fixture `url`: a place where nothing is yet."""

    @pytest.fixture
    @abc.abstractmethod
    def url(self) -> object: ...

    def test_tells_when_a_file_was_written(self, url: str) -> None:
        new, before_s = storage.join(url, "new"), time.time()
        storage.write_bytes(new, b"1")
        assert before_s - 2 <= storage.modified_s(new) <= time.time() + 2
        with pytest.raises(NotFound):
            storage.modified_s(storage.join(url, "nothing"))

    @pytest.fixture
    def tree_url(self, url: str) -> str:
        root = storage.join(url, "tree")
        for path, data in TREE.items():
            storage.write_bytes(storage.join(root, path), data)
        return root

    def test_writes_replaces_and_removes(self, url: str) -> None:
        file_url = storage.join(url, "new/folder/file")
        storage.write_bytes(file_url, b"first, and longer")
        storage.write_bytes(file_url, memoryview(b"second")[1:])
        assert storage.read_bytes(file_url) == b"econd"
        assert [f.path for f in storage.list_files(url)] == ["new/folder/file"]
        storage.remove(file_url)
        storage.remove(file_url)
        assert not storage.exists(file_url)

    def test_writes_large_data_and_files(self, url: str, tmp_path: Path) -> None:
        data = os.urandom(2**20) * 37  # more than one part of an upload
        source_path = tmp_path / "source"
        source_path.write_bytes(data)
        storage.write_file(storage.join(url, "file"), source_path)
        storage.write_bytes(storage.join(url, "bytes"), memoryview(data))
        for name in ("file", "bytes"):
            assert storage.read_bytes(storage.join(url, name)) == data
        with storage.open_binary(storage.join(url, "file")) as file:
            file.seek(3)
            assert file.read(20 * 2**20) == data[3 : 3 + 20 * 2**20]

    def test_write_file_of_a_missing_source_is_not_found(self, url: str, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            storage.write_file(storage.join(url, "x"), tmp_path / "gone")
        assert not storage.exists(storage.join(url, "x"))

    def test_probe_leaves_nothing(self, url: str) -> None:
        storage.check_writable(storage.join(url, "run"))
        with pytest.raises(NotFound):
            storage.list_files(url)

    def test_tar_headers_are_read_through_it(self, url: str, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name in ("s3.py", "faults.py"):
                tar.add(Path(__file__).parents[1] / "support" / name, name)
        storage.write_file(storage.join(url, "a.tar"), tmp_path / "a.tar")
        with (
            storage.open_binary(storage.join(url, "a.tar")) as file,
            tarfile.open(None, "r:", file) as tar,
        ):
            members = {m.name: (m.offset_data, m.size) for m in tar}
        start, size = members["s3.py"]
        text = storage.read_range(storage.join(url, "a.tar"), start, start + size)
        assert text == (Path(__file__).parents[1] / "support" / "s3.py").read_bytes()


class TestLocal(StorageContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return str(tmp_path / "root")


class TestFileUrl(ReadContract):
    @pytest.fixture
    def tree_url(self, tmp_path: Path) -> str:
        _write_tree(tmp_path / "tree")
        return f"file://{tmp_path}/tree"


class TestMemory(StorageContract):
    @pytest.fixture
    def url(self) -> str:
        return f"memory://{uuid.uuid4().hex}"


class TestS3(StorageContract):
    @pytest.fixture
    def url(self, s3: S3Server) -> str:
        return s3.url("root")


class TestS3ByS3fsAlone(StorageContract):
    """As where obstore is not installed."""

    @pytest.fixture
    def url(self, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.setenv("LIGHTSHIP_S3_CLIENT", "s3fs")
        return s3.url()


class TestZip(ReadContract):
    @pytest.fixture
    def tree_url(self, tmp_path: Path) -> str:
        return f"zip::{_write_zip(tmp_path)}"


class TestZipOnS3(ReadContract):
    @pytest.fixture
    def tree_url(self, s3: S3Server, tmp_path: Path) -> str:
        archive_url = s3.url("tree.zip")
        storage.write_file(archive_url, _write_zip(tmp_path))
        return f"zip://::{archive_url}"


class TestTarOnS3(ReadContract):
    @pytest.fixture
    def tree_url(self, s3: S3Server, tmp_path: Path) -> str:
        _write_tree(tmp_path / "tree")
        with tarfile.open(tmp_path / "tree.tar", "w") as tar:
            tar.add(tmp_path / "tree", "root")
        archive_url = s3.url("tree.tar")
        storage.write_file(archive_url, tmp_path / "tree.tar")
        return f"tar://root::{archive_url}"


def _write_tree(folder: Path) -> None:
    for path, data in TREE.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def _write_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "tree.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in TREE.items():
            archive.writestr(path, data)
    return folder / "tree.zip"


# ---- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "parts", "joined", "name"),
    [
        ("s3://b", ("x", "y.jpg"), "s3://b/x/y.jpg", "y.jpg"),
        ("s3://b/x/", ("/y/",), "s3://b/x/y", "y"),
        ("runs/a", ("b",), "runs/a/b", "b"),
        ("/", ("a",), "/a", "a"),
        ("", ("a",), "a", "a"),
        ("file:///", ("a",), "file:///a", "a"),
        ("zip://::s3://b/x.zip", ("train/a.jpg",), "zip://train/a.jpg::s3://b/x.zip", "a.jpg"),
        ("zip::s3://b/x.zip", ("t", "a"), "zip://t/a::s3://b/x.zip", "a"),
        ("zip://t::s3://b/x.zip", ("a",), "zip://t/a::s3://b/x.zip", "a"),
        ("zip::s3://b/x.zip", (), "zip::s3://b/x.zip", "x.zip"),
        ("https://h/x.zip?sig=1", (), "https://h/x.zip?sig=1", "x.zip"),
    ],
)
def test_join_and_base_name(url: str, parts: tuple[str, ...], joined: str, name: str) -> None:
    assert storage.join(url, *parts) == joined
    assert storage.base_name(joined) == name


def test_local_and_remote() -> None:
    assert storage.local_path("file:///a/b") == Path("/a/b")
    assert storage.local_path("a/b") == Path("a/b")
    for url in ("s3://b/x", "memory://x", "zip::/a.zip", "https://h/x"):
        assert storage.is_remote(url)
        with pytest.raises(ConfigError, match="not a path"):
            storage.local_path(url)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://user:hunter22@host/x", "host/x"),
        ("https://h/x.zip?X-Amz-Signature=hunter22&a=b", "https://h/x.zip?"),
        ("zip://a::https://h/x.zip?sig=hunter22", "zip://a::https://h/x.zip?"),
        ("Credential=hunter22/20260101/us-east-1", "Credential="),
        ('{"aws_secret_access_key": "hunter22"}', "aws_secret_access_key"),
        ("Authorization: Bearer hunter22", "Authorization"),
        ("the token hunter22-of-the-environment", "the token"),
    ],
)
def test_credentials_are_never_printed(
    text: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter22-of-the-environment")
    assert "hunter22" not in storage.redact(text)
    assert kept in storage.redact(text)


def test_redact_keeps_plain_text() -> None:
    text = "s3://bucket/a b/c.jpg has 3 bytes; bytes 0 to 4 were expected"
    assert storage.redact(text) == text


# ---- local files -------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["", "plain://"])
def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path: Path, protocol: str) -> None:
    """Also on a file system of fsspec that writes in place."""
    path = tmp_path / "x"
    program = "import sys, itertools; from lightship import storage; import tests.support.plain_fs"
    program += "\nfor i in itertools.count():\n"
    program += "    storage.write_bytes(sys.argv[1], bytes([i % 251]) * 2_000_000)"
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", program, f"{protocol}{path}"])
        before = path.stat().st_mtime_ns if path.exists() else 0
        while not path.exists() or path.stat().st_mtime_ns == before:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        data = path.read_bytes()
        assert len(data) == 2_000_000
        assert len(set(data)) == 1
        assert storage.list_files(str(tmp_path)) == [FileInfo("x", 2_000_000)]


@pytest.mark.parametrize("protocol", ["plain", "refusing", "silent"])
def test_a_file_is_replaced_where_no_file_is_renamed_over_another(
    tmp_path: Path, protocol: str
) -> None:
    url = f"{protocol}://{tmp_path}/x"
    for data in (b"one", b"two", b"three"):
        storage.write_bytes(url, data)
        assert (tmp_path / "x").read_bytes() == data
        assert [path.name for path in tmp_path.iterdir()] == ["x"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("protocol", ["refusing", "silent"])
@pytest.mark.parametrize("moves", [0, 1, 2, 3])
def test_a_file_is_not_lost_when_its_writer_is_killed_between_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str, moves: int
) -> None:
    path, url = tmp_path / "x", f"{protocol}://{tmp_path}/x"
    kind = {"refusing": plain_fs.Refusing, "silent": plain_fs.Silent}[protocol]
    mv, moved = kind.mv, []

    def dead(*args: object, **how: object) -> None:
        raise Killed

    def move(self: plain_fs.Plain, *args: str, **how: object) -> None:
        if len(moved) == moves:
            monkeypatch.setattr(kind, "rm_file", dead)  # as of then it does nothing more
            raise Killed
        moved.append(args)
        mv(self, *args, **how)

    storage.write_bytes(url, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(kind, "mv", move)
        with suppress(Killed):
            storage.write_bytes(url, b"new")
    monkeypatch.undo()
    assert storage.read_bytes(url) == (b"old" if moves < 3 else b"new")
    assert path.exists()
    storage.write_bytes(url, b"newer")
    assert storage.read_bytes(url) == b"newer"
    storage.remove(url)
    assert not storage.exists(url)


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, url = tmp_path / "x", f"plain://{tmp_path}/x"
    storage.write_bytes(url, b"old")
    write = plain_fs.File.write

    def full(self: plain_fs.File, data: bytes) -> int:
        write(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(plain_fs.File, "write", full)
    with pytest.raises(ConfigError, match="no space left"):
        storage.write_bytes(url, b"new and longer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("at_once", "piece_s"), [(8, 3.5), (1, 0.65)], ids=["on one line", "one by one"]
)
def test_a_download_may_take_longer_than_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, piece_s: float
) -> None:
    """Of the slowest line that is allowed, and more than the bytes that are asked for at once."""
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "1.5")
    monkeypatch.setattr(registry, "PIECE_BYTES", 2**16)
    for module in (local, api):
        monkeypatch.setattr(module, "COPIED_BYTES", 2**19)
    monkeypatch.setattr(Remote, "max_reads", at_once)
    read, asked = plain_fs.Plain.cat_file, []

    def slow(self: plain_fs.Plain, path: str, **how: int) -> bytes:
        asked.append(how)
        time.sleep(piece_s)
        return read(self, path, **how)

    monkeypatch.setattr(plain_fs.Plain, "cat_file", slow)
    data = os.urandom(2**19)
    (tmp_path / "x").write_bytes(data)
    storage.download(f"plain://{tmp_path}/x", tmp_path / "y")
    assert (tmp_path / "y").read_bytes() == data
    assert len(asked) == 8


def test_links_are_followed_but_not_for_ever(tmp_path: Path) -> None:
    _write_tree(tmp_path / "tree")
    (tmp_path / "tree" / "loop").symlink_to(tmp_path / "tree")
    (tmp_path / "linked").symlink_to(tmp_path / "tree" / "train")
    assert len(storage.list_files(str(tmp_path / "tree"))) == len(TREE)
    assert len(storage.list_files(str(tmp_path / "linked"))) == 3


@pytest.fixture
def hanging() -> Iterator[list[str]]:
    """Paths of streams of this process whose reads wait for a writer, and none comes."""
    pipes = [os.pipe() for _ in range(Limits.threads)]
    yield [f"/dev/fd/{reader}" for reader, _ in pipes]
    for reader, writer in pipes:
        os.close(writer)
        os.close(reader)


@pytest.mark.timeout(60)
def test_a_hanging_file_ends_in_a_time_out_and_lets_the_process_go(hanging: list[str]) -> None:
    program = (
        "import sys; from lightship import storage\ntry:\n    storage.read_bytes(sys.argv[1])\n"
    )
    program += "except storage.StorageTimeout as error:\n    sys.exit(error.exit_code)"
    env = {**os.environ, "LIGHTSHIP_STORAGE_DEADLINE_S": "1"}
    command = [sys.executable, "-c", program, "/dev/stdin"]
    with open(hanging[0]) as stdin:
        done = subprocess.run(command, env=env, timeout=50, stdin=stdin)
    assert done.returncode == 74


@pytest.mark.timeout(60)
def test_an_error_among_spans_does_not_wait_for_the_others(
    tmp_path: Path, hanging: list[str]
) -> None:
    with pytest.raises(NotFound, match="gone"):
        storage.read_spans([Span(path, 0, 4) for path in (hanging[0], f"{tmp_path}/gone")])


@pytest.mark.timeout(60)
def test_reads_ahead_are_as_many_at_once_after_a_pause(tmp_path: Path, hanging: list[str]) -> None:
    (tmp_path / "file").write_bytes(b"1234")
    reads = ReadAhead()
    assert reads.result(reads.begin(Span(str(tmp_path / "file"), 0, 4))) == b"1234"
    until = time.monotonic() + 30
    while not reads._executor._idle:
        assert time.monotonic() < until
    futures = [reads.begin(Span(path, 0, 4)) for path in hanging]
    while (at_once := sum(future.running() for future in futures)) < len(hanging):
        assert time.monotonic() < until, f"{at_once} of {len(hanging)} reads at once"
    reads.close()


def test_an_unwritable_place_is_named_with_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"--run.output .*/file/run cannot be written"):
        storage.check_writable(str(tmp_path / "file" / "run"))


def test_deadline_must_be_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "soon")
    with pytest.raises(ConfigError, match="LIGHTSHIP_STORAGE_DEADLINE_S is 'soon'"):
        storage.read_bytes(str(tmp_path))


# ---- kinds of storage, access ------------------------------------------------------------------


def test_unknown_and_missing_kinds_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'foo://' is no known storage"):
        storage.read_bytes("foo://x")
    with pytest.raises(ConfigError, match="zip:// needs its archive"):
        storage.read_bytes("zip://x")
    (tmp_path / "bad.zip").write_bytes(b"this is no archive")
    with pytest.raises(DataError, match="not a whole zip"):
        storage.list_files(f"zip::{tmp_path}/bad.zip")
    with pytest.raises(ConfigError, match="only read"):
        storage.write_bytes(f"zip://x::{_write_zip(tmp_path)}", b"1")


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_missing_package_is_named_with_how_to_install_it() -> None:
    with pytest.raises(ConfigError, match=r"gs://.*: pip install gcsfs"):
        storage.list_files("gs://bucket/x")


def test_a_reader_may_not_write(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = s3.url()
    storage.write_bytes(storage.join(url, "x"), b"1")
    for name, value in s3.environment("reader").items():
        monkeypatch.setenv(name, value)
    assert storage.read_bytes(storage.join(url, "x")) == b"1"
    with pytest.raises(Denied, match="access denied"):
        storage.write_bytes(storage.join(url, "y"), b"2")
    with pytest.raises(ConfigError, match=r"--run.output s3://.*access denied") as caught:
        storage.check_writable(url)
    assert not any(secret in str(caught.value) for secret in KEYS["reader"])


@pytest.fixture
def without_keys(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a file, in a process that has no credentials and reads tmp_path / "aws"."""
    url = s3.url("x")
    storage.write_bytes(url, b"here")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "aws"))
    monkeypatch.setattr(registry, "_BACKENDS", {})  # whose clients have read another file
    (tmp_path / "aws").write_text("[default]\n")
    return url


@pytest.mark.timeout(60)
def test_no_credentials_are_denied(without_keys: str) -> None:
    """Soon: on a laptop there will never be any."""
    with pytest.raises(Denied, match="AWS_"):
        storage.read_bytes(without_keys)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("read", [storage.exists, storage.read_bytes])
def test_credentials_that_come_a_little_later_are_used(
    without_keys: str, tmp_path: Path, read: Callable[[str], object]
) -> None:
    """As of an identity service that starts together with the pod."""
    key, secret = KEYS["admin"]
    lines = ["[default]", f"aws_access_key_id={key}", f"aws_secret_access_key={secret}", ""]
    later = threading.Timer(1.5, lambda: (tmp_path / "aws").write_text("\n".join(lines)))
    later.start()
    assert read(without_keys) in (True, b"here")
    later.join()


@pytest.mark.timeout(60)
def test_an_identity_service_that_fails_later_is_worth_another_try(
    without_keys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answered before: the configuration is not at fault."""
    key, secret = KEYS["admin"]
    expires = (datetime.now(UTC) + timedelta(minutes=8)).isoformat()  # asked for at each request
    answer = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": secret, "Expiration": expires}
    (tmp_path / "answer").write_text(json.dumps(answer))
    process = f"credential_process = cat {tmp_path}/answer"
    (tmp_path / "aws").write_text(f"[default]\n{process}\n")
    assert storage.exists(without_keys)
    (tmp_path / "answer").rename(tmp_path / "gone")
    now = Limits.now()
    monkeypatch.setattr(Limits, "now", lambda: dataclasses.replace(now, total_s=2.0))
    with pytest.raises(StorageTimeout, match="CredentialRetrievalError"):
        storage.exists(without_keys)
    (tmp_path / "gone").rename(tmp_path / "answer")
    assert storage.exists(without_keys)


def test_a_missing_bucket_is_named(s3: S3Server) -> None:
    with pytest.raises(ConfigError, match=r"--run.output s3://no-such-bucket/run .*NoSuchBucket"):
        storage.check_writable("s3://no-such-bucket/run")


@pytest.mark.parametrize(
    "names",
    [
        ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
        ("FSSPEC_S3_ENDPOINT_URL", "FSSPEC_S3_KEY", "FSSPEC_S3_SECRET"),
    ],
)
def test_standard_variables_alone_are_enough(
    s3: S3Server, tmp_path: Path, names: tuple[str, ...]
) -> None:
    url = s3.url("x")
    storage.write_bytes(url, b"found")
    program = "import sys; from lightship import storage; print(storage.read_bytes(sys.argv[1]))"
    values = (s3.endpoint, *KEYS["admin"])
    env = {"HOME": str(tmp_path), **dict(zip(names, values, strict=True))}
    command = [sys.executable, "-c", program, url]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "b'found'", done.stderr
    assert done.stderr == ""


@pytest.mark.timeout(60)
def test_a_forked_child_reads_and_the_parent_goes_on(s3: S3Server, tmp_path: Path) -> None:
    url, archive_url = s3.url("x"), s3.url("x.zip")
    storage.write_bytes(url, b"shared")
    storage.write_file(archive_url, _write_zip(tmp_path))
    member = f"zip://train/cat/2.jpg::{archive_url}"
    assert storage.read_bytes(url) == b"shared"
    assert storage.read_bytes(member) == b"two"

    def child() -> None:
        assert storage.read_spans([Span(url, 0, 6), Span(member)] * 20) == [b"shared", b"two"] * 20

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    for _ in range(20):
        assert storage.read_spans([Span(url), Span(member)]) == [b"shared", b"two"]
    process.join(30)
    alive = process.is_alive()
    process.kill()
    assert not alive
    assert process.exitcode == 0


# ---- the web -----------------------------------------------------------------------------------


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Python's own web server: it does not know ranges."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    _write_tree(tmp_path / "web")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = partial(Handler, directory=tmp_path / "web")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_web_files_are_read_and_downloaded(web: str, tmp_path: Path) -> None:
    url = f"{web}/z"
    assert storage.read_bytes(url) == TREE["z"]
    assert storage.size_bytes(url) == 3000
    assert storage.list_files(url) == [FileInfo("", 3000)]
    storage.download(url, tmp_path / "z", md5=hashlib.md5(TREE["z"]).hexdigest())
    assert (tmp_path / "z").read_bytes() == TREE["z"]
    with pytest.raises(NotFound):
        storage.size_bytes(f"{web}/gone")
    with pytest.raises(ConfigError, match="sent the whole file"):
        storage.read_range(url, 1, 3)
    with pytest.raises(ConfigError, match="only read"):
        storage.write_bytes(url, b"1")


def test_the_cache_verifies_what_it_holds(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTSHIP_CACHE", str(tmp_path / "cache"))
    url, md5 = f"{web}/z", hashlib.md5(TREE["z"]).hexdigest()
    path = storage.cached_download(url, md5)
    assert path.read_bytes() == TREE["z"]
    assert path.is_relative_to(tmp_path / "cache")
    (tmp_path / "web" / "z").unlink()
    assert storage.cached_download(url, md5) == path
    (tmp_path / "web" / "z").write_bytes(TREE["z"])
    path.write_bytes(b"rotten")
    assert storage.cached_download(url, md5).read_bytes() == TREE["z"]
    local = str(tmp_path / "web" / "z")
    assert storage.cached_download(local, md5) == Path(local)
    with pytest.raises(DataError, match=md5):
        storage.cached_download(local, "0" * 32)


@pytest.mark.timeout(60)
def test_a_dead_web_server_is_not_a_missing_file(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "1")
    with pytest.raises(StorageTimeout):
        storage.exists("http://127.0.0.1:1/x")
