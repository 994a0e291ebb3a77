"""What is read and removed where anybody may have put anything."""

import os
import time
import uuid
from pathlib import Path

import pytest

from lightship import storage
from lightship.errors import ConfigError
from lightship.storage import local
from lightship.storage.retry import Limits


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    return request.getfixturevalue("s3").url("small")


def test_a_small_file_is_read_whole_and_a_larger_one_not(folder: str) -> None:
    for data in (b"", b"x", b"x" * 100):
        storage.write_bytes(f"{folder}/file", data)
        assert storage.read_small(f"{folder}/file", 100) == data
    with pytest.raises(storage.TooLarge, match=r"file has 100 bytes; at most 99 are read"):
        storage.read_small(f"{folder}/file", 99)
    with pytest.raises(storage.NotFound):
        storage.read_small(f"{folder}/missing", 99)
    with pytest.raises(storage.NotFound):
        storage.read_small(folder, 99)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**42)
    with pytest.raises(storage.TooLarge):
        storage.read_small(str(tmp_path / "sparse"), 2**20)


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/full", "pipe"])
def test_what_may_never_end_is_not_read(tmp_path: Path, target: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").symlink_to(tmp_path / target)  # an absolute target stands alone
    with pytest.raises(storage.NotFound, match="pipe, socket or device"):
        storage.read_small(str(tmp_path / "file"), 2**20)
    assert not storage.exists(str(tmp_path / "file"))


def test_a_probe_left_by_a_kill_goes_an_hour_later(tmp_path: Path) -> None:
    """A younger one may be of another start."""
    old, young, mine = (tmp_path / f".{c * 32}.probe" for c in "abx")
    for path in (old, young, mine):
        path.write_bytes(b"")
    for path in (old, mine):
        os.utime(path, (time.time() - 7200,) * 2)
    storage.remove_temporaries(str(tmp_path))
    assert {*tmp_path.iterdir()} == {young, mine}


def test_a_link_is_moved_and_removed_itself(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "link").symlink_to(victim)
    storage.move(str(tmp_path / "link"), str(tmp_path / "moved"))
    assert (tmp_path / "moved").is_symlink()
    storage.write_bytes(str(tmp_path / "moved"), b"new")
    assert not storage.is_link(str(tmp_path / "moved"))
    (tmp_path / "link").symlink_to(victim)
    storage.remove(str(tmp_path / "link"))
    assert victim.read_text() == "precious"
    (tmp_path / "folder").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="folder is a link"):
        storage.refuse_link(str(tmp_path / "folder"))
    storage.refuse_link(str(tmp_path))
    storage.refuse_link("s3://bucket/folder")


def test_temporary_files_are_known_by_their_whole_name(tmp_path: Path) -> None:
    ours, others = f".{'a' * 32}.lightship-tmp", {".a.lightship-tmp", f"{'a' * 32}.lightship-tmp"}
    for name in {ours, *others}:
        (tmp_path / name).touch()
    (tmp_path / f".{'b' * 32}.lightship-tmp").mkdir()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / ours).touch()
    storage.remove_temporaries(str(tmp_path))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*others, "below", f".{'b' * 32}.lightship-tmp"}
    assert (tmp_path / "below" / ours).exists()
    storage.remove_folder(str(tmp_path / "below"))
    assert (tmp_path / "below").exists(), "it holds a file"


def test_a_file_whose_temporary_another_start_removes_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, removed = local._fsync, []

    def late(path: Path) -> None:
        if not removed:
            removed.append(path)
            storage.remove_temporaries(str(tmp_path))
        fsync(path)

    monkeypatch.setattr(local, "_fsync", late)
    storage.write_bytes(str(tmp_path / "file"), b"content")
    assert removed
    assert (tmp_path / "file").read_bytes() == b"content"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_busy_disk_has_the_time_of_any_other_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start must not end because the disk is slower than a wrong address is silent."""
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "60")
    monkeypatch.setattr(Limits, "probe_s", 0.2)
    fsync = local._fsync

    def slow(path: Path) -> None:
        time.sleep(1.5)  # beyond the grace that a deadline has
        fsync(path)

    monkeypatch.setattr(local, "_fsync", slow)
    storage.check_writable(str(tmp_path / "run"))


def test_a_folder_goes_with_the_empty_folders_in_it(tmp_path: Path) -> None:
    (tmp_path / "victim" / "empty").mkdir(parents=True)
    work = tmp_path / "work"
    for folder in ("a/b", "c"):
        (work / folder).mkdir(parents=True)
    (work / "c" / "file").touch()
    (work / "link").symlink_to(tmp_path / "victim")
    storage.remove_folder(str(work))
    assert {path.name for path in work.rglob("*")} == {"c", "file", "link"}
    assert (tmp_path / "victim" / "empty").exists()
    for name in ("c/file", "link"):
        (work / name).unlink()
    storage.remove_folder(str(work))
    storage.remove_folder(str(work))
    assert not work.exists()
