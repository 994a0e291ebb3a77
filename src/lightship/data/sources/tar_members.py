"""The members of one tar, plain or gzipped: where the bytes of each lie, links followed."""

import bisect
import logging
import posixpath
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lightship import storage
from lightship.data.names import printable
from lightship.data.sources.cifar import check_cifar_size, may_be_cifar
from lightship.data.sources.file_names import is_ignored, is_image, suffix
from lightship.data.sources.gzip_file import Gunzipped
from lightship.data.sources.parts import Label
from lightship.data.sources.tar_labels import MAX_LABEL_BYTES, is_label, parse_label
from lightship.errors import DataError, LightshipError
from lightship.storage.tar_headers import BLOCK_BYTES, Member, is_header, read_headers

logger = logging.getLogger(__name__)
_MAX_LINKS = 40  # as Linux's own limit
_MAX_DEPTH = 64
"""Folders around a member, of which one or more may be links."""
_MAX_LEADS = 16
"""How many times, on average, links may lead to a member."""
_MAX_PADDING_BYTES = 2**20  # the largest record that tars are usually padded to
_CHUNK_BYTES = 2**20
_Place = tuple[int, int]


@dataclass
class TarMembers:
    """What one tar holds. Paths are without a leading `./`, `../` or `/`."""

    places: dict[str, _Place] = field(default_factory=dict)
    """Path -> (offset, length) in the order of the tar; length 0 for an unreadable image."""
    folders: list[str] = field(default_factory=list)
    labels: dict[str, Label] = field(default_factory=dict)
    """Path of a .cls or .json -> its label; empty if they are not wanted."""
    bytes_of: dict[str, bytes] = field(default_factory=dict)
    """The content of what may be a CIFAR archive's file."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Image -> why it cannot be read."""


def read_members(url: str, gzipped: bool, name: str, labelled: bool = True) -> TarMembers:
    """Read every header of a tar, and its labels. Rank 0; blocks.

    Hard links and symbolic links to files and folders within the tar are followed; a link that
    leads nowhere stays as an unreadable image.

    Args:
        url: Of the tar.
        gzipped: Whether it is gzipped.
        name: What to call it in messages.
        labelled: Whether labels are read.

    Raises:
        DataError: It is damaged, cut, out of bounds, or followed by another tar.
    """
    try:
        with storage.open_binary(url) as stream:
            plain: Any = Gunzipped(stream, name) if gzipped else stream
            found = _Headers(plain, name, labelled)
            end = 0
            for member in _in_whole_tar(read_headers(plain), name):
                found.add(member)
                end = member.start + -(-member.size // BLOCK_BYTES) * BLOCK_BYTES
            _check_end(plain, end, name)
            if gzipped:
                while plain.read(_CHUNK_BYTES):  # to the end, where the checksum is
                    pass
            return found.resolve()
    except LightshipError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, MemoryError, RecursionError) as error:
        raise DataError(f"{name} is not a whole tar: {error}") from error


def _in_whole_tar(members: Iterator[Member], name: str) -> Iterator[Member]:
    while True:
        try:
            member = next(members, None)
        except DataError as error:
            raise DataError(f"{name} is not a whole tar: {error}") from error
        if member is None:
            return
        yield member


def _check_end(plain: Any, end: int, name: str) -> None:
    """Whether only padding follows the first of the two blocks of zeros that end a tar.

    Args:
        plain: The tar.
        end: Where the first of them begins.
        name: What to call it in messages.

    Raises:
        DataError: There is more.
    """
    plain.seek(end + BLOCK_BYTES)
    second = plain.read(BLOCK_BYTES)
    if not second:
        logger.warning(f"{name} ends in one block of zeros, not two: cut near its end?")
    at, block = end + BLOCK_BYTES, second
    while block and not any(block):
        at += len(block)
        if at - end > _MAX_PADDING_BYTES + 2 * BLOCK_BYTES:
            raise DataError(
                f"{name} is not a whole tar: it ends at byte {end} and goes on with "
                f"more than {_MAX_PADDING_BYTES} zeros, as an incomplete download does"
            )
        block = plain.read(BLOCK_BYTES)
    if not block:
        return
    if is_header(block):
        raise DataError(
            f"{name}: another tar follows at byte {at}, after the end of the first; unpack both "
            "and make one tar of them, or join them with tar --concatenate"
        )
    logger.warning(f"{name}: what follows the end of the tar, from byte {at} on, is not used")


def _clean(path: str) -> str:
    """The path below the tar's root, which is ""."""
    path = posixpath.normpath(path).lstrip("/")
    while path.startswith("../"):
        path = path.removeprefix("../")
    return "" if path in (".", "..") else path


class _Headers:
    """The headers of one tar as they come, and what its links lead to once all are known.

    Args:
        plain: The tar; read for labels between two headers.
        name: What to call it in messages.
        labelled: Whether labels are read.
    """

    def __init__(self, plain: Any, name: str, labelled: bool) -> None:
        self.plain, self.name, self.labelled = plain, name, labelled
        self.places: dict[str, _Place] = {}
        self.order: dict[str, int] = {}
        """Path -> offset of its header."""
        self.folders: list[str] = []
        self.links: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}
        self.labels: dict[tuple[_Place, str], Label | DataError] = {}
        self.bytes_at: dict[_Place, bytes] = {}
        self.leads = 0

    def add(self, member: Member) -> None:
        """Take note of one member; of a path that comes twice the last counts, as if unpacked."""
        path, target = _clean(member.path), _link_target(member)
        if path.count("/") > _MAX_DEPTH:
            raise DataError(
                f"{self.name}: {printable(path[:80])}... lies in {path.count('/')} folders; at "
                f"most {_MAX_DEPTH} are read"
            )
        if member.kind == "folder":
            self.folders.append(path)
            return
        if target == path:  # GNU tar's entry for a file that it was given twice
            return
        for known in (self.places, self.links, self.unreadable):
            known.pop(path, None)
        self.order.setdefault(path, member.header)
        if target is not None:
            self.links[path] = target
        elif member.kind == "file":
            self.places[path] = place = (member.start, member.size)
            self._read(path, place)
        else:
            is_sparse = member.kind == "sparse"
            self.unreadable[path] = "stored sparse" if is_sparse else "a device or a pipe"

    def _read(self, path: str, place: _Place) -> None:
        """Keep a label, or the content of what may be a CIFAR archive's file."""
        if is_ignored(path):
            return
        start, size = place
        if self.labelled and is_label(path):
            key = (place, suffix(path))
            if key in self.labels:
                return
            where = f"{self.name}: {printable(path)}"
            if size > MAX_LABEL_BYTES:
                raise DataError(
                    f"{where} has {size} bytes, which is no label; at most {MAX_LABEL_BYTES}"
                )
            self.plain.seek(start)
            try:
                self.labels[key] = parse_label(path, self.plain.read(size), where)
            except DataError as error:
                self.labels[key] = error  # unless another member takes its path
        elif may_be_cifar(path) and place not in self.bytes_at:
            total = size + sum(map(len, self.bytes_at.values()))
            check_cifar_size(total, self.name)
            self.plain.seek(start)
            self.bytes_at[place] = self.plain.read(size)

    def resolve(self) -> TarMembers:
        """The members with links followed. Reads labels that a link leads to."""
        found = TarMembers(folders=self.folders)
        self._by_name = sorted(self.order)
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
            self._read(path, place)
            label = self.labels.get((place, suffix(path)))
            if isinstance(label, DataError):
                raise label
            if label is not None:
                found.labels[path] = label
            if may_be_cifar(path) and place in self.bytes_at:
                found.bytes_of[path] = self.bytes_at[place]
        return found

    def _lead(self, path: str, above: tuple[str, ...]) -> Iterator[tuple[str, _Place | None]]:
        """(path, place) of a member, or of all in the folder that a link leads to.

        Raises:
            DataError: Links to folders that hold links lead to far more paths than there are.
        """
        self.leads += 1
        if self.leads > _MAX_LEADS * len(self.order) + 1000:
            raise DataError(
                f"{self.name}: its links to folders lead to more than {self.leads - 1} paths, from "
                f"{len(self.order)} members, such as {printable(path)}; unpack it without them"
            )
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
        inside = self._inside(prefix)
        if not inside:
            yield path, None
        for each in inside:
            for lead, place in self._lead(each, (*above, target)):
                yield f"{path}/{lead.removeprefix(prefix)}", place

    def _inside(self, prefix: str) -> list[str]:
        """The paths that begin with `prefix`, in the order of the tar."""
        first = bisect.bisect_left(self._by_name, prefix)
        last = bisect.bisect_left(self._by_name, f"{prefix}\U0010ffff") if prefix else None
        return sorted(self._by_name[first:last], key=self.order.__getitem__)

    def _target(self, path: str) -> str | None:
        """Where a path leads, with every link in it followed; None: in a circle, or too far."""
        for _ in range(_MAX_LINKS):
            parts = path.split("/")
            if len(parts) > _MAX_DEPTH:
                return None
            heads = ("/".join(parts[:i]) for i in range(1, len(parts) + 1))
            link = next((head for head in heads if head in self.links), None)
            if link is None:
                return path
            path = f"{self.links[link]}{path[len(link) :]}".lstrip("/" * (not self.links[link]))
        return None


def _link_target(member: Member) -> str | None:
    """The path that a link leads to; None: it is none. One out of the tar is kept as it is."""
    if member.kind == "hard link":
        return _clean(member.target)
    if member.kind != "link":
        return None
    folder = posixpath.dirname(_clean(member.path))
    target = posixpath.normpath(posixpath.join(folder, member.target))
    return "" if target == "." else target
