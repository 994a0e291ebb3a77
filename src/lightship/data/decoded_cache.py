"""Decoded splits on local disk, so that the next start on the same images decodes nothing.

One file a split: its pixels, and behind them a footer of version, size and CRC-32. A file's name is
a hash of all that its pixels depend on. It is never trusted more than the images: the folder is the
user's alone (mode 0700), and every byte is checked before use. What is wrong with a file or the
disk costs a decoding, never a run.
"""

import contextlib
import hashlib
import json
import logging
import mmap
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import numpy as np

from lightship import storage
from lightship.config import DataConfig
from lightship.data.checksum import crc32
from lightship.data.images.limits import ImageLimits
from lightship.data.manifest import Manifest
from lightship.data.private_folder import is_own_file, make_private
from lightship.data.regime import resize_of

logger = logging.getLogger(__name__)
VERSION = 1
"""Of the format, and of what our own code makes of an image: raise it when either changes."""
_MAGIC, _FOOTER_BYTES = b"lightship decoded", 64
_SUFFIX, _ABANDONED_S = ".pixels", 86400.0
_CHUNK_BYTES = 4 * 2**20
_MIN_FREE_SHARE = 0.1
_DECODERS = "pillow", "simplejpeg", "torch"
CACHED_BYTES = 2**20
"""A split whose files are less is decoded as soon as a cached one would be checked."""


class DecodedCache:
    """The decoded splits of this user; beyond `max_bytes` the least recently used are removed.

    Safe between processes: files appear whole, and one that is mapped stays readable when it is
    removed.

    Args:
        max_bytes: Bound of all files; 0: no cache.
        folder: Default: under the cache's folder ($LIGHTSHIP_CACHE).
    """

    def __init__(self, max_bytes: int, folder: Path | None = None) -> None:
        self.folder, self.max_bytes = folder or storage.cache_path("decoded"), max_bytes

    @classmethod
    def of(cls, config: DataConfig) -> "DecodedCache":
        """As the data section sets it."""
        return cls(int(config.decoded_cache_gib * 2**30))

    def path(self, key: str) -> Path:
        """Where the pixels of a split are kept."""
        return self.folder / f"{key}{_SUFFIX}"

    def load(self, key: str, shape: Sequence[int]) -> np.ndarray | None:
        """The pixels of a split, `shape` uint8, mapped copy-on-write; None: not cached. Blocks."""
        path, size_bytes = self.path(key), int(np.prod(shape))
        if not self.max_bytes or not self._is_private():
            return None
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return None
        with open(descriptor, "rb"):
            if not is_own_file(descriptor):
                return None
            if os.fstat(descriptor).st_size == size_bytes + _FOOTER_BYTES:
                memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
                if memory[size_bytes:] == _footer(memoryview(memory)[:size_bytes]):
                    with contextlib.suppress(OSError):
                        os.utime(path)
                    return np.frombuffer(memory, np.uint8, size_bytes).reshape(shape)
        logger.warning(f"{path} is damaged; it is removed, and the images are decoded again")
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def store(self, key: str, pixels: np.ndarray) -> None:
        """Keep the pixels of a split, [N, S, S, 3] uint8, if they fit. Blocks on the disk."""
        path, size_bytes = self.path(key), pixels.nbytes + _FOOTER_BYTES
        if size_bytes > self.max_bytes or not self._is_private() or path.exists():
            return
        temporary_path = self.folder / f".{uuid.uuid4().hex}"
        try:
            self._make_room(size_bytes)
            disk = shutil.disk_usage(self.folder)
            if disk.free - size_bytes < _MIN_FREE_SHARE * disk.total:
                return
            with temporary_path.open("xb") as file:
                content = np.ascontiguousarray(pixels).data.cast("B")
                file.write(content)
                file.write(_footer(content))
            temporary_path.replace(path)
        except OSError as error:
            logger.debug(f"decoded images are not cached: {error}")
        finally:
            with contextlib.suppress(OSError):
                temporary_path.unlink(missing_ok=True)

    def _is_private(self) -> bool:
        return make_private(self.folder, "decoded images are")

    def _make_room(self, size_bytes: int) -> None:
        """Remove the least recently used, and what a killed process left half written."""
        files = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                if path.suffix == _SUFFIX:
                    files.append((status.st_mtime, status.st_size, path))
                elif path.name[:1] == "." and time.time() - status.st_mtime > _ABANDONED_S:
                    path.unlink()
        total_bytes = size_bytes + sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total_bytes <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total_bytes -= size


def key_of_split(
    config: DataConfig, manifest: Manifest, size_px: int, content: str | None = None
) -> str | None:
    """`key_of` a split whose images have that side; None also where the cache is of no use."""
    if not config.decoded_cache_gib or manifest.size_bytes < CACHED_BYTES:
        return None
    limits = {**asdict(ImageLimits.of(config)), "flags": None, "memory_bytes": None}
    settings = [size_px, resize_of(config), limits, manifest.max_sample_bytes]
    return key_of(manifest, settings, content)


def key_of(
    manifest: Manifest, settings: Sequence[object], content: str | None = None
) -> str | None:
    """What the decoded pixels of a split depend on, as a hash. Blocks on local files.

    Args:
        manifest: The split.
        settings: Of the decoding, as plain values.
        content: `content_of(manifest)`, if it is known already.

    Returns:
        32 hex digits; None: no sign of the content's version, or nothing that takes decoding.
    """
    if manifest.encoding != "image":
        return None
    content = content or content_of(manifest)
    if content is None:
        return None
    versions = [VERSION, *map(metadata.version, _DECODERS)]
    facts = json.dumps([manifest.fingerprint(), content, versions, settings])
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def content_of(manifest: Manifest) -> str | None:
    """What tells the content of a split's files, as a hash; None: nothing. Blocks on local files.

    It is known by checksums, where the manifest has them; else by each local file's size, inode and
    times, of which one (ctime) no program can set back.
    """
    digest = hashlib.sha256()
    return digest.hexdigest() if add_content(digest, manifest, manifest.file_index) else None


def add_content(digest: "hashlib._Hash", manifest: Manifest, files: np.ndarray) -> bool:
    """Add to a hash what tells the content of a split's files. Blocks on local files.

    Nothing if the manifest has checksums, which its fingerprint covers.

    Args:
        digest: The hash.
        manifest: The split.
        files: Numbers of the files, [M] integers.

    Returns:
        Whether it tells their content.
    """
    if manifest.is_checked:
        return True
    if storage.is_remote(manifest.root):
        return False
    root = os.fspath(storage.local_path(manifest.root))  # once: it takes longer than a stat
    try:
        for number in np.unique(files).tolist():
            name = manifest.files[number].strip("/")
            status = os.stat(os.path.join(root, name) if name else root)
            facts = status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns
            digest.update(f"{facts}\n".encode())
    except OSError:
        return False
    return True


def _footer(content: memoryview) -> bytes:
    """What follows the pixels in a file."""
    crc = 0
    for start in range(0, len(content), _CHUNK_BYTES):
        crc = crc32(content[start : start + _CHUNK_BYTES], crc)
    facts = f" {VERSION} {len(content)} {crc:08x}".encode()
    return (_MAGIC + facts).ljust(_FOOTER_BYTES)
