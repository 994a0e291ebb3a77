"""fsspec: any file system that it knows, and what each protocol needs (S3: s3.py)."""
# ruff: noqa: D102 (see backend.Backend)

import contextlib
import errno
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.registry import get_filesystem_class

from lightship.errors import ConfigError, DataError
from lightship.extras import INSTALL
from lightship.storage.backend import Data, Selection, Source, length_of, wrong_length
from lightship.storage.errors import WrongLength, http_answer
from lightship.storage.file_table import FileTable, FileTableBuilder
from lightship.storage.local import TEMPORARY, copy_source
from lightship.storage.retry import Deadline, Limits
from lightship.storage.urls import redact

ASIDE = ".lightship-old"
_WRITE_WHOLE = {"hf", "memory"}
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "hf": "hf"}


def file_system_class(protocol: str, url: str) -> Any:
    """fsspec's class for a protocol. Raises ConfigError without one, or without its package."""
    try:
        return get_filesystem_class(protocol)
    except ValueError as error:
        raise ConfigError(
            f"{redact(url)}: '{protocol}://' is no known storage; use a path, s3://, gs://, hf://, "
            "https:// or another protocol of fsspec"
        ) from error
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        need = INSTALL[extra] if extra else str(error)
        raise ConfigError(f"{redact(url)}: '{protocol}://' needs a package: {need}") from error


def url_options(kind: Any, url: str) -> dict[str, Any]:
    """What `url` sets of its file system, such as a host and a user.

    `_get_kwargs_from_urls` is private in fsspec; without it a URL sets nothing.
    """
    return getattr(kind, "_get_kwargs_from_urls", lambda url: {})(url)


class Remote:
    """A file system of fsspec, through its blocking calls.

    Args:
        fs: The file system.
        is_read_only: Whether `write` is refused.
    """

    max_reads = Limits.threads
    _writes_whole = False

    def __init__(self, fs: Any, is_read_only: bool = False):
        self.fs, self.is_read_only = fs, is_read_only
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else {*fs.protocol}
        self._writes_whole |= is_read_only or not protocols.isdisjoint(_WRITE_WHOLE)

    def connect(self, deadline: Deadline, path: str) -> None:
        self.fs.exists(path)

    def files(self, deadline: Deadline, path: str, selection: Selection) -> FileTable:
        max_files = selection.max_files
        info = self.fs.info(path)
        if info["type"] != "directory":
            return FileTable.of({"": size_of(info) or 0})
        found = {} if max_files else self.fs.find(path, detail=True)
        for _, _, files in self.fs.walk(path, detail=True) if max_files else ():
            found |= {each["name"]: each for each in files.values()}
            if max_files and len(found) >= max_files:
                break
        table = FileTableBuilder()
        for name, each in found.items():
            table.add(name.removeprefix(path).lstrip("/"), size_of(each) or 0)
        return table.finish()

    def size(self, deadline: Deadline, path: str) -> int | None:
        return size_of(self._restoring(self.fs.info, path))

    def modified(self, deadline: Deadline, path: str) -> float:
        return self._restoring(self.fs.modified, path).timestamp()

    def read(self, deadline: Deadline, path: str, start: int, end: int | None) -> Data:
        try:
            data = self.get(deadline, path, start, end)
        except Exception as error:
            if http_answer(error)[0] != 416:  # the range lies beyond the end
                raise
            data = b""
        if end is not None and len(data) != end - start:
            raise wrong_length(path, self.size(deadline, path), start, end, len(data))
        return data

    def get(self, deadline: Deadline, path: str, start: int, end: int | None) -> Data:
        """As `read`, but shorter where the file is."""
        return self._restoring(self.fs.cat_file, path, start=start or None, end=end)

    def get_file(self, deadline: Deadline, path: str, to_path: Path) -> None:
        """Download the file without ranges."""
        self.fs.get_file(path, str(to_path))

    def write(self, deadline: Deadline, path: str, source: Source) -> None:
        if self.is_read_only:
            raise ConfigError(f"{redact(path)}: archives and web addresses are only read")
        self.put(deadline, path, source)
        if (size := self.size(deadline, path)) != length_of(source):
            raise WrongLength(f"{size} of {length_of(source)} bytes arrived")

    def put(self, deadline: Deadline, path: str, source: Source) -> None:
        """As `write`, whose result is then checked.

        Under another name beside, then renamed: most of these file systems write in place.
        """
        folder, slash, _ = path.rpartition("/")
        if folder:
            self.fs.makedirs(folder, exist_ok=True)
        if self._writes_whole:
            self._send(deadline, path, source)
            return
        temporary = f"{folder}{slash}.{uuid.uuid4().hex}{TEMPORARY}"
        try:
            self._send(deadline, temporary, source)
            if (size := self.size(deadline, temporary)) != length_of(source):
                raise WrongLength(f"{size} of {length_of(source)} bytes arrived")
            self._rename(temporary, path)
        except BaseException:
            with contextlib.suppress(Exception):
                self.fs.rm_file(temporary)
            raise

    def _send(self, deadline: Deadline, path: str, source: Source) -> None:
        with self.fs.open(path, "wb") as out:
            copy_source(source, out, deadline)

    def _rename(self, path: str, to_path: str) -> None:
        """Rename over a file. Where that cannot be done, the old file is put aside until then.

        SMB raises an error; WebHDFS answers that it did nothing, of which fsspec says nothing.
        """
        aside = _aside(to_path)
        if not self._is_moved(path, to_path):
            self._remove_if_there(aside)
            for source, target in ((to_path, aside), (path, to_path)):
                if not self._is_moved(source, target):
                    raise OSError(f"the file system does not rename to {redact(target)}")
        self._remove_if_there(aside)

    def _is_moved(self, path: str, to_path: str) -> bool:
        try:
            self.fs.mv(path, to_path)
        except OSError as error:
            if error.errno != errno.EEXIST and not isinstance(error, FileExistsError):
                raise
            return False
        return not self._is_there(path)

    def _is_there(self, path: str) -> bool:
        try:
            self.fs.info(path)
        except FileNotFoundError:
            return False
        return True

    def _remove_if_there(self, path: str) -> None:
        if self._is_there(path):
            self.fs.rm_file(path)

    def _restoring(self, call: Callable[..., Any], path: str, **how: Any) -> Any:
        """`call(path)`; of a file whose writer was killed while it was put aside, the old one."""
        try:
            return call(path, **how)
        except FileNotFoundError:
            if self._writes_whole or not self._is_there(_aside(path)):
                raise
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                self.fs.mv(_aside(path), path)
            return call(path, **how)

    def remove(self, deadline: Deadline, path: str) -> None:
        if not self._writes_whole:
            self._remove_if_there(_aside(path))  # first: it would be restored
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(path)


def _aside(path: str) -> str:
    """Where a file waits while a new one takes its name."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}.{name}{ASIDE}"


class Async(Remote):
    """An object store, with coroutines (s3, http, gs, ...): many reads in flight at once.

    It has no folders, and writes a file whole.
    """

    _writes_whole = True

    max_reads = Limits.in_flight

    def get(self, deadline: Deadline, path: str, start: int, end: int | None) -> Data:
        return cat_file(self.fs, deadline, path, start, end)

    def put(self, deadline: Deadline, path: str, source: Source) -> None:
        if isinstance(source, Path):
            self.fs.put_file(str(source), path)
        else:
            self.fs.pipe_file(path, bytes(source))


def cat_file(
    fs: Any, deadline: Deadline, path: str, start: int, end: int | None, **how: Any
) -> bytes:
    """One GET by an asynchronous file system, cancelled at the deadline."""
    if start or end is not None:  # bytes=0- of an empty object would be an error
        how |= {"start": start, "end": end}
    return fs.cat_file(path, timeout=max(deadline.left_s(), 1e-3), **how)


def size_of(info: dict[str, Any]) -> int | None:
    """Bytes of a file of which fsspec has this; None for a folder."""
    if info["type"] == "directory":
        return None
    if info["size"] is None:
        raise DataError(f"{redact(info['name'])}: the server does not report its size")
    return info["size"]
