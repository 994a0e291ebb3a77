"""Little data sets of every layout, made of the same images, for all tests."""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightship import storage
from lightship.data.manifest import Manifest
from lightship.data.sources import layouts

Files = dict[str, bytes]
"""Path under a root -> content."""
CLASSES = ("ant", "bee", "cat")


def little_set(
    splits: Sequence[str] = ("train", "val", "test"),
    per_class: int = 4,
    classes: Sequence[str] = CLASSES,
    size_px: tuple[int, int] = (8, 8),
    image_format: str = "png",
) -> Files:
    """Class folders SPLIT/CLASS/NNN.png of noise, each image unlike any other."""
    rng = np.random.default_rng(0)
    return {
        f"{split}/{name}/{i:03d}.{image_format}": encoded(
            rng.integers(0, 256, (*size_px, 3), dtype=np.uint8), image_format
        )
        for split in splits
        for name in classes
        for i in range(per_class)
    }


def encoded(pixels: np.ndarray, image_format: str = "png") -> bytes:
    """[H, W, 3] or [H, W] uint8 as a file; JPEG is lossy."""
    buffer = io.BytesIO()
    kind = {"jpg": "JPEG"}.get(image_format, image_format)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    """[H, W, 3] uint8, by Pillow alone."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def expected(files: Files) -> dict[str, list[tuple[str, np.ndarray]]]:
    """Split -> [(class, pixels)] of a `little_set`, in the order of the sorted paths."""
    splits: dict[str, list[tuple[str, np.ndarray]]] = {}
    for path, data in sorted(files.items()):
        split, name = path.split("/")[:2]
        splits.setdefault(split, []).append((name, pixels_of(data)))
    return splits


def put(url: str, files: Mapping[str, bytes]) -> str:
    """Writes the files under `url`, which it returns."""
    for path, data in files.items():
        storage.write_bytes(storage.join(url, path), data)
    return url


def zipped(files: Mapping[str, bytes], top: str = "") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(top + path, data)
    return buffer.getvalue()


def tarred(files: Mapping[str, bytes], gzipped: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if gzipped else "w") as tar:
        for path, data in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def webdataset(
    files: Files, shard_size: int = 5, labels: str = "number", gzipped: bool = False
) -> Files:
    """Shards SPLIT-NNN.tar of a `little_set`: labels as number, text or json; and classes.txt."""
    classes = sorted({path.split("/")[1] for path in files})
    shards: Files = {} if labels == "text" else {"classes.txt": "\n".join(classes).encode()}
    for split in sorted({path.split("/")[0] for path in files}):
        paths = sorted(path for path in files if path.startswith(f"{split}/"))
        for shard, start in enumerate(range(0, len(paths), shard_size)):
            members: Files = {}
            for i, path in enumerate(paths[start : start + shard_size]):
                name = path.split("/")[1]
                key, ext = f"{start + i:06d}", path.rpartition(".")[2]
                number = classes.index(name)
                if labels == "json":
                    members[f"{key}.json"] = json.dumps({"label": number, "w": 8}).encode()
                else:
                    members[f"{key}.cls"] = (name if labels == "text" else str(number)).encode()
                members[f"{key}.{ext}"] = files[path]
            file = f"{split}-{shard:03d}.tar{'.gz' if gzipped else ''}"
            shards[file] = tarred(members, gzipped)
    return shards


def parquet(
    files: Files, per_file: int = 5, features: bool = True, as_struct: bool = True
) -> Files:
    """data/SPLIT-NNNNN-of-NNNNN.parquet of a `little_set`, two rows a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    classes = sorted({path.split("/")[1] for path in files})
    written: Files = {}
    for split in sorted({path.split("/")[0] for path in files}):
        paths = sorted(path for path in files if path.startswith(f"{split}/"))
        starts = range(0, len(paths), per_file)
        for shard, start in enumerate(starts):
            chosen = paths[start : start + per_file]
            names = [path.split("/")[1] for path in chosen]
            images: Any = [files[path] for path in chosen]
            if as_struct:
                images = [{"bytes": files[path], "path": path} for path in chosen]
            labels = [classes.index(name) for name in names] if features else names
            table = pa.table({"image": images, "label": labels})
            if features:
                label = {"names": classes, "_type": "ClassLabel"}
                info = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
                table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
            buffer = io.BytesIO()
            pq.write_table(table, buffer, row_group_size=2)
            name = f"data/{split}-{shard:05d}-of-{len(starts):05d}.parquet"
            written[name] = buffer.getvalue()
    return written


def cifar_pixels(count: int, seed: int = 0) -> np.ndarray:
    """[count, 3, 32, 32] uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def cifar10(train: np.ndarray, test: np.ndarray, classes: Sequence[str] = CLASSES) -> Files:
    """The unpacked CIFAR-10 python archive; the label of row i is i % len(classes)."""
    names = {b"label_names": [name.encode() for name in classes], b"num_vis": 3072}
    files = {"cifar-10-batches-py/batches.meta": python2_pickle(names)}
    for i, rows in enumerate(np.array_split(train, 5)):
        first = sum(len(part) for part in np.array_split(train, 5)[:i])
        labels = [(first + row) % len(classes) for row in range(len(rows))]
        files[f"cifar-10-batches-py/data_batch_{i + 1}"] = _batch(rows, labels, b"labels")
    labels = [row % len(classes) for row in range(len(test))]
    files["cifar-10-batches-py/test_batch"] = _batch(test, labels, b"labels")
    files["cifar-10-batches-py/readme.html"] = b"<html>"
    return files


def cifar100(train: np.ndarray, test: np.ndarray, classes: Sequence[str] = CLASSES) -> Files:
    """The unpacked CIFAR-100 python archive; the fine label of row i is i % len(classes)."""
    encoded_names = [name.encode() for name in classes]
    meta = {b"coarse_label_names": [b"animal"], b"fine_label_names": encoded_names}
    files = {"cifar-100-python/meta": python2_pickle(meta)}
    for name, rows in (("train", train), ("test", test)):
        labels = [row % len(classes) for row in range(len(rows))]
        files[f"cifar-100-python/{name}"] = _batch(rows, labels, b"fine_labels")
    return files


def _batch(rows: np.ndarray, labels: list[int], label_key: bytes) -> bytes:
    flat = rows.reshape(len(rows), -1)
    return python2_pickle({b"batch_label": b"batch", label_key: labels, b"data": flat})


def python2_pickle(value: Any) -> bytes:
    """Protocol 2 as Python 2 wrote it (the CIFAR archives): text is bytes, arrays are raw bytes.

    Python 3's pickler cannot write these opcodes, so they are put together here.
    """
    return b"\x80\x02" + b"".join(_opcodes(value)) + b"."


def _opcodes(value: Any) -> Iterator[bytes]:
    if isinstance(value, bytes):
        yield b"T" + len(value).to_bytes(4, "little") + value
    elif isinstance(value, int):
        yield b"J" + value.to_bytes(4, "little", signed=True)
    elif isinstance(value, list):
        yield b"]("
        for item in value:
            yield from _opcodes(item)
        yield b"e"
    elif isinstance(value, dict):
        yield b"}("
        for key, item in value.items():
            yield from _opcodes(key)
            yield from _opcodes(item)
        yield b"u"
    else:
        assert isinstance(value, np.ndarray), type(value)
        yield b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tT\x01\x00\x00\x00btR"
        yield b"(K\x01("
        for side in value.shape:
            yield from _opcodes(side)
        yield b"tcnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
        yield b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        yield from _opcodes(value.tobytes())
        yield b"tb"


REAL_CIFAR10 = Path(
    os.environ.get("CIFAR10_TAR", Path(__file__).parents[3] / "shared/data/cifar10-jpeg.tar.xz")
)


def real_cifar10(**per_class: int) -> Files:
    """Class folders of the first images of each class and split; skips the test without them."""
    if not REAL_CIFAR10.exists():
        pytest.skip(f"no real images: set CIFAR10_TAR to a tar of them (looked at {REAL_CIFAR10})")
    found: Files = {}
    with tarfile.open(REAL_CIFAR10) as archive:
        for member in archive:
            if member.isfile():
                split, name, image = member.name.split("/")[-3:]
                if int(Path(image).stem) < per_class[split]:
                    found[f"{split}/{name}/{image}"] = archive.extractfile(member).read()  # type: ignore[union-attr]
    assert len(found) == 10 * sum(per_class.values())
    return found


def bad_folder(folder: Path) -> tuple[Manifest, dict[int, str]]:
    """A manifest some of whose files have gone bad, and the word that tells of each."""
    paths = [folder / "train" / "ant" / f"{i:03d}.png" for i in range(4)]
    paths[1].write_bytes(b"")
    manifest = layouts.scan(str(folder))["train"]
    paths[0].write_bytes(paths[0].read_bytes()[:50])
    paths[2].unlink()
    return manifest, {0: "truncated", 1: "empty", 2: "not found"}
