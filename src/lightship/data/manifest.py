"""The manifest: one table of samples, whatever they come from."""

import functools
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Literal

import numpy as np

from lightship import storage, versions
from lightship.data.blocks import Blocks
from lightship.data.file_list import FileList
from lightship.data.mapped_split import NUMBERS, MappedSplit
from lightship.data.npz import read_npz
from lightship.errors import DataError, LightshipError
from lightship.redaction import canonical
from lightship.storage.bounds import MAX_FILE_BYTES
from lightship.storage.urls import stays_inside

BLOCK_BYTES = 4 * 2**20
_SMALL_BYTES, _MAX_BLOCK_SAMPLES = 256 * 2**20, 2**16
_FORMAT = "manifest"
_SPLIT_SEED = 20_100_617  # never changes: every run holds out the same images
_READ_AT_ONCE_BYTES, _MAX_HEADER_BYTES, _MAX_CONTAINERS = 2**28, 2**26, 2**20
_FREE_SAMPLES, _MAX_SAMPLES_PER_BYTE = 2**20, 16  # the smallest tables have a byte a sample
_FILES_AT_ONCE, _VALUES_AT_ONCE = 2**16, 2**18
_CONTAINERS = ("bytes", "gzip", "parquet")


@dataclass(frozen=True)
class Manifest:
    """One split: where the bytes of each sample lie, and its class. N samples in training order."""

    root: str
    """URL that `files` are relative to (`storage.join(root, file)`; "" is the root itself)."""
    files: Sequence[str]
    """Given in any form, held as a `FileList`."""
    file_index: np.ndarray
    """[N] into `files`. Like every column of any integer type: a mapped column has the narrowest
    that holds its values, so convert to int64 before computing."""
    offset: np.ndarray
    """[N] first byte in the file; container "gzip": of the decompressed file; "parquet": row."""
    length: np.ndarray
    """[N] bytes; container "parquet": the mean of the row group."""
    label: np.ndarray
    """[N] into `class_names`, -1 unlabelled."""
    crc32: np.ndarray
    """[N] CRC-32 of the sample's bytes, -1 unknown."""
    class_names: list[str]
    container: Literal["bytes", "gzip", "parquet"]
    encoding: str
    """"image" (JPEG, PNG, WebP ... bytes) or "raw:3x32x32" (uint8 pixels, CHW)."""
    members: Sequence[str] | None = None
    """[N] what each sample is called within its file, where that is known: names for a table of
    predictions. They are no part of the fingerprint."""
    max_sample_bytes: int = 2**30
    """A larger sample is unreadable (`--data.max_sample_mib`); not saved."""
    scan_id: str = ""
    """Of the scan that found the samples, the same whenever its run starts again; empty: not known.
    Not saved, and no part of the fingerprint."""
    not_read: str = ""
    """What else lies at the root and no reader takes, in words (`24 .heic files`)."""
    mapped: MappedSplit | None = field(default=None, repr=False, compare=False)
    """The file that the columns are mapped from (see `manifest_table.py`)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", FileList.of(self.files))

    def __len__(self) -> int:
        return len(self.label)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is mapped, which the reader of a pickle maps itself."""
        state = dict(self.__dict__)
        if self.mapped is not None:
            for name, value in self.mapped.fields.items():
                if state[name] is value:
                    del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update((state["mapped"].fields if state["mapped"] else {}) | state)

    @property
    def _summary(self) -> MappedSplit | None:
        """The mapped file's summary of the columns, if they all are the mapped ones."""
        mapped = self.mapped
        if mapped is None:
            return None
        is_whole = all(getattr(self, name) is value for name, value in mapped.fields.items())
        return mapped if is_whole else None

    def url(self, file_number: int) -> str:
        """URL of `files[file_number]`."""
        file = self.files[file_number]
        return storage.join(self.root, file) if file else self.root

    def name(self, i: int) -> str:
        """What sample `i` is called: its file, and #member (else #offset or #row) within it."""
        file = self.files[self.file_index[i]] or storage.base_name(self.root)
        if self.members is not None:
            return f"{file}#{self.members[i]}"
        whole_file = self.container == "bytes" and self.offset[i] == 0
        return file if whole_file else f"{file}#{self.offset[i]}"

    @property
    def is_small(self) -> bool:
        """Whether there are so few bytes (256 MiB) that a shuffle need not care where they lie."""
        return self.size_bytes <= _SMALL_BYTES

    @functools.cached_property
    def size_bytes(self) -> int:
        """Bytes of all samples."""
        return self._summary.size_bytes if self._summary else int(self.length.sum())

    @property
    def first_unlabelled(self) -> int | None:
        """The first sample without a label; None: all have one."""
        if self._summary:
            return self._summary.first_unlabelled
        is_unlabelled = self.label < 0
        return int(np.argmax(is_unlabelled)) if is_unlabelled.any() else None

    @property
    def is_checked(self) -> bool:
        """Whether each sample has a checksum, by which its content is known."""
        crc32 = self.crc32
        if crc32.dtype.kind == "u":  # as a mapped column without -1: no pass over it
            return True
        return int((crc32 if crc32.strides[0] else crc32[:1]).min(initial=0)) >= 0

    def blocks(self) -> Blocks:
        """Neighbouring samples that are read together: about 4 MiB each, or row groups.

        They follow from the number of samples and their bytes alone, so that a folder and the
        shards packed from it have the same.
        """
        if self.container == "parquet":
            edges = self.block_edges()
            sizes, counts = np.unique(np.diff(edges), return_counts=True)
            return Blocks(edges, int(sizes[np.argmax(sizes * counts)]))
        size = len(self) * BLOCK_BYTES // max(1, self.size_bytes)
        return Blocks(np.array([0, len(self)]), max(1, min(size, len(self), _MAX_BLOCK_SAMPLES)))

    def block_edges(self) -> np.ndarray:
        """Row groups of Parquet, or the blocks of version 1 of the order, [K + 1] int64.

        Block k holds the samples from edges[k] up to edges[k + 1].
        """
        if self._summary and self._summary.edges is not None:
            return self._summary.edges.astype(np.int64)
        if self.container == "parquet":
            changes = [
                np.diff(column, prepend=-1) != 0 for column in (self.file_index, self.length)
            ]
            number = np.cumsum(changes[0] | changes[1])
        else:
            number = (np.cumsum(self.length) - self.length) // BLOCK_BYTES
        inner = np.flatnonzero(np.diff(number)) + 1
        return np.concatenate([[0], inner, [len(self)]]).astype(np.int64)

    def within(self, max_sample_mib: float) -> "Manifest":
        """The same samples, of which larger ones are unreadable."""
        return replace(self, max_sample_bytes=int(max_sample_mib * 2**20))

    def take(self, ids: np.ndarray | Sequence[int]) -> "Manifest":
        """The samples `ids` ([M] integers, any order), with the files they need and no others."""
        ids = np.asarray(ids, dtype=np.int64)
        used, file_index = np.unique(self.file_index[ids], return_inverse=True)
        return replace(
            self,
            files=FileList.of(self.files[i] for i in used),
            file_index=file_index.astype(np.int32),
            mapped=None,
            members=None if self.members is None else [self.members[i] for i in ids.tolist()],
            **{column: getattr(self, column)[ids] for column in NUMBERS[1:]},
        )

    def content_key(self) -> str | None:
        """What tells the samples' bytes from others under the same names; None: nothing does.

        Without checksums that is the scan: an object may be overwritten by one of the same length,
        and its bytes are then those of this run, from its first epoch to its last restart.
        """
        if self.is_checked:
            return self.fingerprint()
        return f"{self.fingerprint()} {self.scan_id}" if self.scan_id else None

    def fingerprint(self) -> str:
        """Hex digest of all but `root`: equal where the same samples come in the same order."""
        if self._summary:
            return self._summary.fingerprint
        digest = hashlib.sha256()
        digest.update(b"[[")
        for start in range(0, len(self.files), _FILES_AT_ONCE):
            some = json.dumps(list(self.files[start : start + _FILES_AT_ONCE]))[1:-1]
            digest.update(f"{', ' if start else ''}{some}".encode())
        rest = json.dumps([self.class_names, self.container, self.encoding])
        digest.update(f"], {rest[1:]}".encode())
        for column in NUMBERS:
            values = getattr(self, column)
            for start in range(0, len(values), _VALUES_AT_ONCE):
                digest.update(values[start : start + _VALUES_AT_ONCE].astype("<i8").data)
        return digest.hexdigest()[:32]


def save_manifests(url: str, manifests: Mapping[str, Manifest]) -> None:
    """Write all splits as one compressed .npz at `url`, atomically. Rank 0; blocks."""
    arrays: dict[str, Any] = {}
    header: dict[str, Any] = {"format": versions.VERSIONS[_FORMAT], "splits": {}}
    for split, manifest in manifests.items():
        header["splits"][split] = {
            "root": canonical(manifest.root),
            "class_names": manifest.class_names,
            "container": manifest.container,
            "encoding": manifest.encoding,
            "fingerprint": manifest.fingerprint(),
        }
        arrays[f"{split}.files"] = np.frombuffer(FileList.of(manifest.files).text, dtype=np.uint8)
        for column in NUMBERS:
            values = getattr(manifest, column)
            small = np.result_type(
                *map(np.min_scalar_type, (values.min(initial=0), values.max(initial=0)))
            )
            arrays[f"{split}.{column}"] = values.astype(small)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, header=_as_bytes(json.dumps(header)), **arrays)
    storage.write_bytes(url, buffer.getbuffer())


def load_manifests(url: str) -> dict[str, Manifest]:
    """Read what `save_manifests` wrote. Every rank; blocks.

    Raises:
        DataError: The file is damaged.
        NewerVersion: A newer version wrote it.
    """
    where = storage.redact(url)
    try:
        with _open(url) as stream:
            size_bytes = stream.seek(0, io.SEEK_END)
            arrays = read_npz(stream, where)
        header = json.loads(_checked_header(arrays["header"].tobytes()))
        versions.check(_FORMAT, header["format"], where)
        max_samples = _FREE_SAMPLES + _MAX_SAMPLES_PER_BYTE * size_bytes
        loaded = {
            split: _loaded(split, about, arrays, max_samples)
            for split, about in header["splits"].items()
        }
        if len({tuple(manifest.class_names) for manifest in loaded.values()}) != 1:
            raise ValueError("it has no split, or splits of different classes")
        for split, about in header["splits"].items():
            if loaded[split].fingerprint() != about["fingerprint"]:
                raise DataError(f"{where} is damaged: fingerprint of {split} differs")
    except LightshipError:
        raise
    except Exception as error:  # zip, NumPy and JSON raise anything on damaged bytes
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{where} is not a manifest or is damaged: {reason:.200}") from error
    return loaded


def _open(url: str) -> BinaryIO:
    """The file; read at once, unless it is large."""
    try:
        return io.BytesIO(storage.read_small(url, _READ_AT_ONCE_BYTES))
    except storage.TooLarge:
        return storage.open_binary(url)


def _checked_header(data: bytes) -> bytes:
    """JSON whose values take little more memory than its text. Raises ValueError."""
    containers = data.count(b"[") + data.count(b"{")
    if len(data) > _MAX_HEADER_BYTES or containers > _MAX_CONTAINERS:
        raise ValueError(f"its header has {len(data)} bytes and {containers} lists")
    return data


def _loaded(
    split: str, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray], max_samples: int
) -> Manifest:
    """One split of a file. Raises ValueError for a table that no scan makes."""
    if (count := len(arrays[f"{split}.label"])) > max_samples:
        raise ValueError(f"{split} has {count} samples; at most {max_samples} fit in the file")
    files = arrays[f"{split}.files"].tobytes()
    if files.count(0) > max_samples:
        raise ValueError(f"{split} has {files.count(0)} files")
    raw = {column: arrays[f"{split}.{column}"] for column in NUMBERS}
    for column, values in raw.items():
        if values.dtype.kind not in "iu" or values.ndim != 1 or len(values) != len(raw["label"]):
            raise ValueError(f"{split}.{column} is {values.dtype} of shape {values.shape}")
        if not len(values):
            raise ValueError(f"{split} has no sample")
    columns: dict[str, Any] = {  # as narrow as they were saved
        name: values if values.itemsize < 8 else values.astype(np.int64, copy=False)
        for name, values in raw.items()
    }
    manifest = Manifest(
        root=about["root"],
        files=FileList.from_text(files),
        class_names=about["class_names"],
        container=about["container"],
        encoding=about["encoding"],
        **columns,
    )
    check_description(split, manifest)
    names = manifest.class_names
    if strange := [file for file in manifest.files if not stays_inside(file)]:
        raise ValueError(f"{split} names {strange[0]!r:.80}, which is not below its root")
    bounds = {"file_index": (0, len(manifest.files)), "label": (-1, len(names))}
    for column, values in raw.items():
        least, end = bounds.get(column, (-1 if column == "crc32" else 0, MAX_FILE_BYTES))
        if not (least <= int(values.min()) and int(values.max()) < end):
            raise ValueError(f"{split}.{column} goes from {values.min()} to {values.max()}")
    if not raw["length"].sum(dtype=np.float64) < 2**62:
        raise ValueError(f"{split} has more bytes than there are")
    return manifest


def check_description(split: str, manifest: Manifest) -> None:
    """Raise ValueError for class names, a root, a container or an encoding that no scan gives."""
    names = manifest.class_names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the class names of {split} are {names!r:.80}")
    text = (manifest.root, manifest.container, manifest.encoding, manifest.not_read)
    is_text = all(isinstance(each, str) for each in text)
    is_known = is_text and re.fullmatch(r"image|raw:\d+x\d+x\d+", text[2])
    if not is_known or text[1] not in _CONTAINERS:
        raise ValueError(f"the root, container and encoding of {split} are {text[:3]!r:.80}")


def refuse_one_class(train: Manifest, root: str) -> None:
    """Raise DataError, naming the most likely mistake of layout, if there is only one class.

    Args:
        train: The train split.
        root: data.root, as it was given.
    """
    if len(train.class_names) > 1:
        return
    [name] = train.class_names
    shown = storage.redact(root)
    first = train.name(0)
    _, is_folder, below = first.partition(f"{name}/")
    where = f"{shown}/train" if first.startswith("train/") else shown
    if not is_folder:
        advice = "all of its labels are the same"
    elif "/" in below:
        folder = below.partition("/")[0]
        advice = f"if its sub-folders ({folder}, ...) are the classes, move them to {where}"
    else:
        advice = f"each class is a folder of images directly below {where}"
    raise DataError(
        f"--data.root {shown} has only one class, '{name}' ({len(train)} train images), and "
        f"a classifier needs two: {advice}"
    )


def split_validation(manifest: Manifest, fraction: float) -> tuple[Manifest, Manifest | None]:
    """Hold out about `fraction` of the samples, the same ones on every call.

    Stratified: each class gives its share (largest remainders first) and keeps at least one sample
    for training; both parts keep the manifest's order. At least one sample is held out.

    Returns:
        (train, val); val is None when `fraction` is 0.

    Raises:
        DataError: No class has two samples, so none can be held out.
    """
    assert 0 <= fraction < 1, fraction
    if fraction == 0:
        return manifest, None
    _, counts = np.unique(manifest.label, return_counts=True)
    room = counts - 1
    if not room.sum():
        raise DataError(
            f"--data.val_fraction {fraction:g}: no class has two images, so none can be held out; "
            "add a val split or set --data.val_fraction 0"
        )
    share = np.minimum(np.floor(counts * fraction).astype(np.int64), room)
    missing = min(max(1, round(len(manifest) * fraction)), int(room.sum())) - int(share.sum())
    by_remainder = np.argsort(share - counts * fraction, kind="stable")
    for c in by_remainder[share[by_remainder] < room[by_remainder]][: max(0, missing)]:
        share[c] += 1
    # RandomState, because NumPy promises its stream for ever.
    shuffled = np.random.RandomState(_SPLIT_SEED).permutation(len(manifest))
    by_class = shuffled[np.argsort(manifest.label[shuffled], kind="stable")]
    rank_in_class = np.arange(len(manifest)) - np.repeat(np.cumsum(counts) - counts, counts)
    held_out = np.zeros(len(manifest), dtype=bool)
    held_out[by_class[rank_in_class < np.repeat(share, counts)]] = True
    return manifest.take(np.flatnonzero(~held_out)), manifest.take(np.flatnonzero(held_out))


def _as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)
