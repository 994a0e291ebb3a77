"""A uid without a name, a home that cannot be written, a TMPDIR that is not there."""

import getpass
import os
import pwd
import tempfile

import pytest

from lightship.cli import host_environment
from lightship.errors import ConfigError

_NAMES = ("HOME", "TMPDIR", "LOGNAME", "USER", "LNAME", "USERNAME", "XDG_CACHE_HOME",
          "MPLCONFIGDIR")  # fmt: skip


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """A uid without passwd entry and none of the variables; all is put back."""

    def nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr("atexit.register", lambda *args, **kwargs: None)
    for name in _NAMES:
        monkeypatch.setenv(name, "")  # so that what the call sets is undone
        monkeypatch.delenv(name)


def test_a_uid_without_passwd_entry_gets_a_name_and_a_home():
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()  # as torch's compiler calls it
    host_environment.complete()
    assert getpass.getuser() == f"uid{os.getuid()}"
    assert os.path.expanduser("~/x") == "/x"


def test_what_can_be_used_is_left(monkeypatch, tmp_path):
    for name in _NAMES:
        monkeypatch.setenv(name, str(tmp_path))
    host_environment.complete()
    host_environment.provide_folders(None)
    assert {os.environ[name] for name in _NAMES} == {str(tmp_path)}


def test_a_home_that_can_be_written_keeps_its_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    host_environment.provide_folders(None)
    assert "XDG_CACHE_HOME" not in os.environ
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("home", ["read-only", "a file", "missing"])
def test_caches_go_to_a_private_folder_where_home_cannot_be_written(monkeypatch, tmp_path, home):
    home_path = tmp_path / home
    if home == "read-only":
        home_path.mkdir(mode=0o500)
        monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(home_path))  # root
    elif home == "a file":
        home_path.write_text("")
        monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(home_path))
    else:
        home_path = "/proc/1/nowhere"
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("/proc"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(home_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    host_environment.provide_folders(None)
    cache_path = tmp_path / "tmp" / f"lightship-{os.getuid()}"
    assert os.environ["XDG_CACHE_HOME"] == str(cache_path)
    assert os.environ["MPLCONFIGDIR"].startswith(str(cache_path))
    assert cache_path.stat().st_mode & 0o777 == 0o700
    cache_path.chmod(0o777)  # as if somebody else had made it
    del os.environ["XDG_CACHE_HOME"]
    host_environment.provide_folders(None)
    assert os.environ["XDG_CACHE_HOME"] != str(cache_path)


def test_a_temporary_folder_that_is_not_there_is_replaced(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nonexistent/tmp")
    host_environment.provide_folders(None)
    assert os.environ["TMPDIR"] == tempfile.gettempdir() != "/nonexistent/tmp"


def no_temporary_folder():
    raise FileNotFoundError("No usable temporary directory found")


@pytest.mark.parametrize("there", ["/dev/shm", "output", None])
def test_without_a_temporary_folder_there_is_memory_or_the_output(monkeypatch, tmp_path, there):
    monkeypatch.setattr(tempfile, "gettempdir", no_temporary_folder)
    made = []

    def mkdtemp(prefix, dir):
        if there is None or there not in dir:
            raise OSError(30, "Read-only file system")
        made.append(tmp_path / prefix)
        return str(made[0])

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    if there:
        host_environment.provide_folders(str(tmp_path / "output"))
        assert [os.environ["TMPDIR"]] == [str(path) for path in made] == [tempfile.tempdir]
    else:
        with pytest.raises(ConfigError, match="set TMPDIR"):
            host_environment.provide_folders("memory://bucket/run")
