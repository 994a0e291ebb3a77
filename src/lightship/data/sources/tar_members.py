"""The members of one tar, plain or gzipped: where the bytes of each lie, links followed."""

import gzip
import logging
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lightship import storage
from lightship.data.sources.file_names import is_ignored, is_image, suffix
from lightship.errors import DataError, LightshipError

logger = logging.getLogger(__name__)
_MAX_LINKS = 40  # as Linux's own limit
_MAX_PADDING_BYTES = 2**20  # the largest record that tars are usually padded to
_CHUNK_BYTES = 2**20
_MAX_LABEL_BYTES = 2**24


@dataclass
class TarMembers:
    """What one tar holds. Paths are without a leading `./`, `../` or `/`."""

    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Path -> (offset, length) in the order of the tar; length 0 for an unreadable image."""
    folders: list[str] = field(default_factory=list)
    bytes_of: dict[str, bytes] = field(default_factory=dict)
    """The content of labels (.cls, .json) and of what may be a CIFAR archive's file."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Image -> why it cannot be read."""


def read_members(url: str, gzipped: bool, name: str) -> TarMembers:
    """Read every header of a tar, and the bytes of its labels. Rank 0; blocks.

    Hard links and symbolic links to files and folders within the tar are followed; a link that
    leads nowhere stays as an unreadable image.

    Args:
        url: Of the tar.
        gzipped: Whether it is gzipped.
        name: What to call it in messages.

    Raises:
        DataError: It is damaged, cut, or followed by another tar.
    """
    try:
        with storage.open_binary(url) as stream:
            plain: Any = gzip.GzipFile(fileobj=stream) if gzipped else stream
            source = _LastRead(plain)
            found = _Headers()
            with tarfile.open(fileobj=source, mode="r:") as tar:  # type: ignore[call-overload]
                for member in _members(tar):
                    found.add(member, tar)
                _check_end(source, tar.offset, name)
            if gzipped:
                while plain.read(_CHUNK_BYTES):  # to the end, where the checksum is
                    pass
            return found.resolve(plain)
    except LightshipError:
        raise
    except (
        tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError, MemoryError,
        RecursionError,
    ) as error:  # fmt: skip
        raise DataError(f"{name} is not a whole tar: {error}") from error


class _LastRead:
    """A file that keeps what was read last: tarfile does not say why it stopped."""

    def __init__(self, file: Any):
        self._file, self.last = file, b""
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        self.last = self._file.read(size)
        return self.last


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    end = -1
    while (member := tar.next()) is not None:
        if member.size < 0 or tar.offset <= end:
            raise tarfile.ReadError(f"the header of {member.name} has a negative size")
        end = tar.offset
        yield member
        tar.members = []  # type: ignore[attr-defined]  # it would keep them all


def _check_end(source: _LastRead, end: int, name: str) -> None:
    """Whether the tar ends as one does: two blocks of zeros, and only padding after them.

    tarfile takes whatever is no header for the end: a cut file, a damaged header.
    """
    if len(source.last) < tarfile.BLOCKSIZE:
        raise DataError(
            f"{name} is not a whole tar: it stops at byte {end} without the two blocks of zeros "
            "that end one: cut, or its writer was not closed; download or write it again, or if "
            "nothing is missing, append 1024 zero bytes"
        )
    if any(source.last):
        raise DataError(f"{name} is not a whole tar: no header at byte {end} but something else")
    second = source.read(tarfile.BLOCKSIZE)
    if not second:
        logger.warning(f"{name} ends in one block of zeros, not two: cut near its end?")
    at, block = end + tarfile.BLOCKSIZE, second
    while block and not any(block):
        at += len(block)
        if at - end > _MAX_PADDING_BYTES + 2 * tarfile.BLOCKSIZE:
            raise DataError(
                f"{name} is not a whole tar: it ends at byte {end} and goes on with "
                f"more than {_MAX_PADDING_BYTES} zeros, as an incomplete download does"
            )
        block = source.read(tarfile.BLOCKSIZE)
    if not block:
        return
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        logger.warning(f"{name}: what follows the end of the tar, from byte {at} on, is not used")
    else:
        raise DataError(
            f"{name}: another tar follows at byte {at}, after the end of the first; unpack both "
            "and make one tar of them, or join them with tar --concatenate"
        )


def _clean(path: str) -> str:
    """The path below the tar's root, which is ""."""
    path = posixpath.normpath(path).lstrip("/")
    while path.startswith("../"):
        path = path.removeprefix("../")
    return "" if path in (".", "..") else path


class _Headers:
    """The headers of one tar as they come, and what its links lead to once all are known."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[int, int]] = {}
        self.order: dict[str, int] = {}
        """Path -> offset of its header."""
        self.folders: list[str] = []
        self.links: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}
        self.bytes_at: dict[tuple[int, int], bytes] = {}

    def add(self, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        """Take note of one member; of a path that comes twice the last counts, as if unpacked."""
        path = _clean(member.name)
        target = _link_target(member)
        if member.isdir():
            self.folders.append(path)
            return
        if target == path:  # GNU tar's entry for a file that it was given twice
            return
        for known in (self.places, self.links, self.unreadable):
            known.pop(path, None)
        self.order.setdefault(path, member.offset)
        if target is not None:
            self.links[path] = target
        elif member.issparse():
            self.unreadable[path] = "stored sparse"
        elif member.isfile():
            self.places[path] = place = (member.offset_data, member.size)
            if _is_read(path):
                content = tar.extractfile(member)
                assert content is not None
                self.bytes_at[place] = _read_whole(content, path, member.size)
        else:
            self.unreadable[path] = "a device or a pipe"

    def resolve(self, plain: Any) -> TarMembers:
        """The members with links followed. Reads labels that a link leads to from `plain`."""
        found = TarMembers(folders=self.folders)
        for path in self.order:
            for each, place in self._lead(path, ()):
                if is_ignored(each):
                    continue
                if place is not None:
                    found.places[each] = place
                elif is_image(each):
                    found.places[each] = (self.order[path], 0)
                    found.unreadable[each] = self.unreadable.get(each, "a link that leads nowhere")
        for path, place in found.places.items():
            if _is_read(path):
                if place not in self.bytes_at:
                    plain.seek(place[0])
                    self.bytes_at[place] = _read_whole(plain, path, place[1])
                found.bytes_of[path] = self.bytes_at[place]
        return found

    def _lead(
        self, path: str, above: tuple[str, ...]
    ) -> Iterator[tuple[str, tuple[int, int] | None]]:
        """(path, place) of a member, or of all in the folder that a link leads to."""
        if path not in self.links:
            yield path, self.places.get(path)
            return
        target = self._target(path)
        prefix = f"{target}/" if target else ""
        if target is None or target in self.places or target in self.unreadable:
            yield path, self.places.get(target or "")
            return
        if target in above or f"{path}/".startswith(prefix):
            return  # a link to a folder above would never end
        inside = [each for each in self.order if each.startswith(prefix)]
        if not inside:
            yield path, None
        for each in inside:
            for lead, place in self._lead(each, (*above, target)):
                yield f"{path}/{lead.removeprefix(prefix)}", place

    def _target(self, path: str) -> str | None:
        """Where a path leads, with every link in it followed; None: in a circle."""
        for _ in range(_MAX_LINKS):
            parts = path.split("/")
            heads = ("/".join(parts[:i]) for i in range(1, len(parts) + 1))
            link = next((head for head in heads if head in self.links), None)
            if link is None:
                return path
            path = f"{self.links[link]}{path[len(link) :]}".lstrip("/" * (not self.links[link]))
        return None


def _link_target(member: tarfile.TarInfo) -> str | None:
    """The path that a link leads to; None: it is none. One out of the tar is kept as it is."""
    if member.islnk():
        return _clean(member.linkname)
    if not member.issym():
        return None
    folder = posixpath.dirname(_clean(member.name))
    target = posixpath.normpath(posixpath.join(folder, member.linkname))
    return "" if target == "." else target


def is_label(path: str) -> bool:
    """Whether the extension is that of a sample's label."""
    return suffix(path) in ("cls", "json")


def _is_read(path: str) -> bool:
    return not is_ignored(path) and (is_label(path) or _may_be_cifar(path))


def _read_whole(file: Any, path: str, length: int) -> bytes:
    if is_label(path) and length > _MAX_LABEL_BYTES:
        raise DataError(f"{path} in the tar has {length} bytes, which is no label")
    return file.read(length)


def _may_be_cifar(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.startswith("data_batch_") or name in (
        "test_batch", "batches.meta", "train", "test", "meta")  # fmt: skip
