"""The manifest: one table of samples, whatever they come from."""

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from lightship import storage, versions
from lightship.errors import DataError, LightshipError

BLOCK_BYTES = 4 * 2**20
_SMALL_BYTES = 256 * 2**20
_FORMAT = "manifest"
_SPLIT_SEED = 20_100_617  # never changes: every run holds out the same images
_COLUMNS = ("file_index", "offset", "length", "label", "crc32")
_CONTAINERS = ("bytes", "gzip", "parquet")


@dataclass(frozen=True)
class Manifest:
    """One split: where the bytes of each sample lie, and its class. N samples in training order."""

    root: str
    """URL that `files` are relative to (`storage.join(root, file)`; "" is the root itself)."""
    files: list[str]
    file_index: np.ndarray
    """[N] int32 into `files`."""
    offset: np.ndarray
    """[N] int64 first byte in the file; container "gzip": in the decompressed file; "parquet": the
    row."""
    length: np.ndarray
    """[N] int64 bytes; container "parquet": the mean of the row group."""
    label: np.ndarray
    """[N] int64 into `class_names`, -1 unlabelled."""
    crc32: np.ndarray
    """[N] int64 CRC-32 of the sample's bytes, -1 unknown."""
    class_names: list[str]
    container: Literal["bytes", "gzip", "parquet"]
    encoding: str
    """"image" (JPEG, PNG, WebP ... bytes) or "raw:3x32x32" (uint8 pixels, CHW)."""
    members: list[str] | None = None
    """[N] what each sample is called within its file, where that is known: names for a table of
    predictions, which neither the saved table nor the fingerprint has."""
    not_read: str = ""
    """What else lies at the root and no reader takes, in words (`24 .heic files`); not saved."""

    def __len__(self) -> int:
        return len(self.label)

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
        return int(self.length.sum()) <= _SMALL_BYTES

    def block_edges(self) -> np.ndarray:
        """Where blocks of neighbouring samples begin and end, [K + 1] int64.

        Block k holds the samples from edges[k] up to edges[k + 1]: 4 MiB of neighbours in training
        order, or the row groups of Parquet. They follow from order and lengths alone, so that a
        folder and the shards packed from it have the same.
        """
        if self.container == "parquet":
            changes = [
                np.diff(column, prepend=-1) != 0 for column in (self.file_index, self.length)
            ]
            number = np.cumsum(changes[0] | changes[1])
        else:
            number = (np.cumsum(self.length) - self.length) // BLOCK_BYTES
        inner = np.flatnonzero(np.diff(number)) + 1
        return np.concatenate([[0], inner, [len(self)]]).astype(np.int64)

    def take(self, ids: np.ndarray | Sequence[int]) -> "Manifest":
        """The samples `ids` ([M] integers, any order), with the files they need and no others."""
        ids = np.asarray(ids, dtype=np.int64)
        used, file_index = np.unique(self.file_index[ids], return_inverse=True)
        return replace(
            self,
            files=[self.files[i] for i in used],
            file_index=file_index.astype(np.int32),
            members=None if self.members is None else [self.members[i] for i in ids.tolist()],
            **{column: getattr(self, column)[ids] for column in _COLUMNS[1:]},
        )

    def fingerprint(self) -> str:
        """Hex digest of all but `root`: equal where the same samples come in the same order."""
        digest = hashlib.sha256()
        plain = [self.files, self.class_names, self.container, self.encoding]
        digest.update(json.dumps(plain).encode())
        for column in _COLUMNS:
            digest.update(getattr(self, column).astype("<i8").tobytes())
        return digest.hexdigest()[:32]


def save_manifests(url: str, manifests: Mapping[str, Manifest]) -> None:
    """Write all splits as one compressed .npz at `url`, atomically. Rank 0; blocks."""
    arrays: dict[str, Any] = {}
    header: dict[str, Any] = {"format": versions.VERSIONS[_FORMAT], "splits": {}}
    for split, manifest in manifests.items():
        header["splits"][split] = {
            "root": manifest.root,
            "class_names": manifest.class_names,
            "container": manifest.container,
            "encoding": manifest.encoding,
            "fingerprint": manifest.fingerprint(),
        }
        arrays[f"{split}.files"] = _as_bytes("\0".join(manifest.files))
        for column in _COLUMNS:
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
    where, data = storage.redact(url), storage.read_bytes(url)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            header = json.loads(arrays["header"].tobytes())
            versions.check(_FORMAT, header["format"], where)
            loaded = {
                split: _loaded(split, about, arrays) for split, about in header["splits"].items()
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


def _loaded(split: str, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Manifest:
    """One split of a file. Raises ValueError for a table that no scan makes."""
    raw = {column: arrays[f"{split}.{column}"] for column in _COLUMNS}
    for column, values in raw.items():
        if values.dtype.kind not in "iu" or values.ndim != 1 or len(values) != len(raw["label"]):
            raise ValueError(f"{split}.{column} is {values.dtype} of shape {values.shape}")
        if not len(values):
            raise ValueError(f"{split} has no sample")
    columns: dict[str, Any] = {name: raw[name].astype(np.int64) for name in _COLUMNS[1:]}
    manifest = Manifest(
        root=about["root"],
        files=arrays[f"{split}.files"].tobytes().decode().split("\0"),
        file_index=raw["file_index"].astype(np.int32),
        class_names=about["class_names"],
        container=about["container"],
        encoding=about["encoding"],
        **columns,
    )
    names = manifest.class_names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the class names of {split} are {names!r:.80}")
    text = (manifest.root, manifest.container, manifest.encoding)
    is_known = manifest.encoding == "image" or re.fullmatch(r"raw:\d+x\d+x\d+", text[2])
    if not isinstance(text[0], str) or text[1] not in _CONTAINERS or not is_known:
        raise ValueError(f"the root, container and encoding of {split} are {text!r:.80}")
    bounds = {"file_index": (0, len(manifest.files)), "label": (-1, len(names))}
    for column, values in raw.items():
        least, end = bounds.get(column, (-1 if column == "crc32" else 0, 2**62))
        if not (least <= int(values.min()) and int(values.max()) < end):
            raise ValueError(f"{split}.{column} goes from {values.min()} to {values.max()}")
    return manifest


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
