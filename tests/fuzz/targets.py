"""Every kind of file that comes from outside, with the reader that a command uses for it."""

import contextlib
import hashlib
import io
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

import lightship
from lightship.checkpoint.loading import MODEL_KEYS, RESUME_KEYS, load_ckpt_path
from lightship.checkpoint.serialization import to_bytes
from lightship.checkpoint.store import CheckpointStore
from lightship.cli.command_line import parse
from lightship.config import PackConfig
from lightship.data.columns import TRAILER_BYTES, Columns
from lightship.data.images.decode import decode
from lightship.data.images.limits import ImageLimits
from lightship.data.manifest import Manifest
from lightship.data.manifest_npz import load_manifests
from lightship.data.manifest_table import check_table, open_table, write_table
from lightship.data.sample_decoder import decode_all
from lightship.data.shards.index import INDEX
from lightship.data.shards.pack import pack
from lightship.data.sources import layouts
from lightship.models.classifier import ImageClassifier
from lightship.models.nets.build import build_net
from lightship.models.nets.weights import load_weights, read_weights
from lightship.predict.shards import Division, Parts
from lightship.run import config_file
from lightship.run.completion import read_results
from lightship.run.restarts import record_start
from lightship.versions import VERSIONS
from tests.fuzz.runner import Target
from tests.support.images import (
    cifar10,
    cifar_pixels,
    little_set,
    parquet,
    put,
    tarred,
    webdataset,
    zipped,
)
from tests.support.little_fit import classifier
from tests.support.older_manifest import save_manifests

_LIMITS = ImageLimits(2**22)  # 4 million pixels: 80 MiB of a decoder at most


def _images(*formats: tuple[str, str, dict[str, Any]]) -> list[bytes]:
    """Images of [48, 64] noise on a ramp, by (format, mode, options of Pillow)."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 64, dtype=np.uint8)[None, :, None]
    pixels = ramp + rng.integers(0, 50, (48, 64, 3), dtype=np.uint8)
    found = []
    for name, mode, options in formats:
        image, buffer = Image.fromarray(pixels).convert(mode), io.BytesIO()
        image.save(buffer, name, **options)
        found.append(buffer.getvalue())
    return found


def _frames(mode: str) -> list[Image.Image]:
    return [Image.new(mode, (64, 48))] * 3


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    return exif.tobytes()


def _decode(data: bytes, folder: Path) -> None:
    decode(data, "image", limits=_LIMITS)
    decode(data, "image", (16, 16), _LIMITS)


IMAGES: dict[str, Callable[[], Sequence[bytes]]] = {
    "jpeg": lambda: _images(
        ("JPEG", "RGB", {"exif": _exif()}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True}), ("JPEG", "RGB", {"restart_marker_blocks": 2}),
    ),
    "png": lambda: _images(
        ("PNG", "RGB", {}), ("PNG", "L", {}), ("PNG", "P", {}), ("PNG", "RGBA", {}),
        ("PNG", "1", {}), ("PNG", "I;16", {}), ("PNG", "RGB", {"exif": _exif()}), ("PNG", "LA", {}),
        ("PNG", "RGB", {"transparency": (1, 2, 3)}),
    ),
    "webp": lambda: _images(
        ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGB", {"exif": _exif(), "save_all": True, "append_images": _frames("RGB")}),
    ),
    "gif": lambda: _images(
        ("GIF", "P", {}), ("GIF", "L", {"transparency": 3}),
        ("GIF", "P", {"save_all": True, "append_images": _frames("P")}),
    ),
    "tiff": lambda: _images(
        ("TIFF", "RGB", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "I;16", {}),
        ("TIFF", "RGB", {"compression": "jpeg"}), ("TIFF", "1", {"compression": "group4"}),
        ("TIFF", "L", {"compression": "tiff_adobe_deflate"}), ("TIFF", "RGBA", {"exif": _exif()}),
    ),
    "bmp": lambda: _images(
        ("BMP", "RGB", {}), ("BMP", "P", {}), ("BMP", "1", {}), ("BMP", "RGBA", {}),
    ),
    "avif": lambda: _images(("AVIF", "RGB", {}), ("AVIF", "RGBA", {})),
}  # fmt: skip


def _read_root(root: str) -> None:
    """What a fit reads of a root: the listing, labels, every sample, its pixels."""
    for manifest in layouts.scan(root).values():
        decode_all(manifest, None, 8, threads=1, max_bad_fraction=1.0, limits=_LIMITS)


def _beside(files: dict[str, bytes], name: str, data: bytes, folder: Path) -> None:
    """One file of a layout changed."""
    _read_root(put(str(folder / "root"), files | {name: data}))


def _alone(name: str, data: bytes, folder: Path) -> None:
    (folder / name).write_bytes(data)
    _read_root(str(folder / name))


@cache
def _set() -> dict[str, bytes]:
    return little_set(("train", "test"), per_class=2)


@cache
def _shards(labels: str) -> dict[str, bytes]:
    return webdataset(_set(), 6, labels)


@cache
def _cifar() -> dict[str, bytes]:
    return cifar10(cifar_pixels(15), cifar_pixels(3))


@cache
def _packed() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        pack(put(f"{folder}/a", _set()), f"{folder}/b", PackConfig(), lambda done, total: None)
        return {
            str(path.relative_to(f"{folder}/b")): path.read_bytes()
            for path in Path(f"{folder}/b").rglob("*")
            if path.is_file()
        }


def _first(files: dict[str, bytes], ending: str) -> tuple[str, bytes]:
    return next((name, data) for name, data in sorted(files.items()) if name.endswith(ending))


def _layout(
    name: str,
    files: Callable[[], dict[str, bytes]],
    ending: str,
    repair: Callable[[bytes], bytes] = bytes,
) -> Target:
    """One file of a layout, by the ending of its name; the others stay as they are."""

    def read(data: bytes, folder: Path) -> None:
        _beside(files(), _first(files(), ending)[0], repair(data), folder)

    return Target(name, lambda: [_first(files(), ending)[1]], read)


def _tar_gz() -> bytes:
    return tarred(_set(), gzipped=True)


def _manifest() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_manifests(f"{folder}/m.npz", layouts.scan(put(f"{folder}/set", _set())))
        return Path(f"{folder}/m.npz").read_bytes()


def _load_manifest(data: bytes, folder: Path) -> None:
    """With its fingerprints, which anyone can compute, made right."""
    load_manifests(_at(folder, _sealed(data)))


def _sealed(data: bytes) -> bytes:
    """A manifest whose fingerprints are those of its tables, if they can be computed at all."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in loaded}
        header = json.loads(arrays["header"].tobytes())
        for split, about in header["splits"].items():
            columns = {
                name.removeprefix(f"{split}."): array
                for name, array in arrays.items()
                if name.startswith(f"{split}.")
            }
            files = columns.pop("files").tobytes().decode().split("\0")
            about["fingerprint"] = Manifest(
                files=files, **columns, **{k: v for k, v in about.items() if k != "fingerprint"}
            ).fingerprint()
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    except Exception:  # past repair, as most mutated files are
        return data
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _table() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "table")
        write_table(path, layouts.scan(put(f"{folder}/set", parquet(_set(), per_file=99))))
        return path.read_bytes()


def _sealed_table(data: bytes) -> bytes:
    """With the digests of the header and the columns, which anyone can compute, made right."""
    place = data.find(b'{"format"')
    header, end = data[place:-TRAILER_BYTES], data[-TRAILER_BYTES:]
    if place > 0 and end.startswith(b"lightship columns"):
        content = hashlib.sha256(data[:place]).hexdigest().encode()
        header = re.sub(rb'("content": ")[0-9a-f]{64}', rb"\g<1>" + content, header)
        digest = hashlib.sha256(header).hexdigest()
        data = data[:place] + header
        data += f"lightship columns 1 {len(header)} {digest}".ljust(TRAILER_BYTES - 1).encode()
        data += b"\n"
    return data


def _open_table(data: bytes, folder: Path) -> None:
    path = Path(_at(folder, _sealed_table(data)))
    columns = Columns(path)
    columns.check_content()
    check_table(columns)
    for manifest in open_table(columns).values():
        manifest.name(len(manifest) - 1)
        manifest.blocks()


def _at(folder: Path, data: bytes, name: str = "file") -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return str(folder / name)


SOURCES = [
    _layout("tar", lambda: _shards("number"), ".tar"),
    _layout("tar json", lambda: _shards("json"), ".tar"),
    _layout("classes.txt", lambda: _shards("number"), "classes.txt"),
    _layout("parquet", lambda: parquet(_set(), per_file=99), ".parquet"),
    _layout("parquet text", lambda: parquet(_set(), per_file=99, features=False), ".parquet"),
    _layout("cifar batch", _cifar, "data_batch_2"),
    _layout("cifar meta", _cifar, "batches.meta"),
    _layout("pack index", _packed, INDEX, repair=_sealed_table),
    _layout("packed shard", _packed, ".tar"),
    _layout("pack.json", _packed, "pack.json"),
    Target("zip", lambda: [zipped(_set())], partial(_alone, "a.zip")),
    Target("tar.gz", lambda: [_tar_gz(), tarred(_cifar(), True)], partial(_alone, "a.tar.gz")),
    Target("manifest", lambda: [_manifest()], lambda data, folder: _load_manifest(data, folder)),
    Target("manifest table", lambda: [_table()], _open_table),
]  # fmt: skip


_RUN = Path(__file__).parents[1] / "data" / "0.1.0" / "finished"


def _of_run(pattern: str) -> bytes:
    return next(iter(sorted(_RUN.glob(pattern)))).read_bytes()


def _checkpoint(data: bytes, folder: Path) -> None:
    """As `test` and `predict` rebuild the model."""
    checkpoint = load_ckpt_path(_at(folder, data, "x.ckpt"), MODEL_KEYS)
    ImageClassifier.from_checkpoint(checkpoint)


def _resumed(data: bytes, folder: Path) -> None:
    """As a fit starts from another run's checkpoint."""
    load_ckpt_path(_at(folder, data, "x.ckpt"), RESUME_KEYS)


def _weights(data: bytes, folder: Path) -> None:
    net = build_net("litcnn", 3, 16)
    weights = read_weights("litcnn", _at(folder, data, "x.pth"))
    load_weights(net, "litcnn", weights, ["a", "b", "c"])


def _config(data: bytes, folder: Path) -> None:
    _at(folder, data, "config.yaml")
    config_file.read(str(folder))


def _record(data: bytes, folder: Path) -> None:
    """As a start looks for the newest checkpoint; the record's own checksum is made right."""
    with contextlib.suppress(ValueError, RecursionError):
        fields = json.loads(data)
        if isinstance(fields, dict):
            fields.pop("check", None)
            text = json.dumps(fields, sort_keys=True).encode()
            data = json.dumps({**fields, "check": hashlib.sha256(text).hexdigest()[:16]}).encode()
    payload = sorted(_RUN.glob("checkpoints/*.ckpt"))[0]
    _at(folder, payload.read_bytes(), f"c/{payload.name}")
    _at(folder, data, f"c/{payload.stem}.commit.json")
    store = CheckpointStore(str(folder / "c"))
    store.newest(), store.best()
    store.open_attempt()


def _attempt(data: bytes, folder: Path) -> None:
    _at(folder, data, "c/attempt")
    CheckpointStore(str(folder / "c")).open_attempt()


def _starts(data: bytes, folder: Path) -> None:
    _at(folder, data, "logs/starts.json")
    record_start(str(folder), 5, 1)


def _part(data: bytes, folder: Path) -> None:
    names, classes = ["a.png", "a.png", "b.png"], ["ant", "bee"]
    parts = Parts(str(folder / "t.csv"), {}, Division(3, 3), names.__getitem__, classes)
    parts.open()
    _at(folder, data, f"t.csv.parts/{parts._name(0)}")
    parts.open()
    for _ in parts.read():
        pass


RUNS = [
    Target("checkpoint", lambda: [_trained()], _checkpoint),
    Target("checkpoint resumed", lambda: [_of_run("checkpoints/*.ckpt")], _resumed),
    Target("weights", lambda: [_trained(), _state_dict(), _safetensors()], _weights),
    Target("commit record", lambda: [_of_run("checkpoints/*.commit.json")], _record),
    Target("attempt", lambda: [b"x"], _attempt),
    Target("config.yaml", lambda: [_of_run("config.yaml")], _config),
    Target("config file", lambda: [_recipe()],
           lambda data, folder: parse(["fit", "--config", _at(folder, data, "c.yaml")])),
    Target("DONE", lambda: [_of_run("DONE")], lambda data, folder: read_results(_at(folder, data))),
    Target("starts.json", lambda: [_of_run("logs/starts.json")], _starts),
    Target("prediction part", lambda: [_rows()], _part),
]  # fmt: skip


def _recipe() -> bytes:
    return (Path(lightship.__file__).parent / "recipes" / "cifar10.yaml").read_bytes()


def _trained() -> bytes:
    model = classifier()
    return bytes(
        to_bytes(
            {
                "state_dict": model.state_dict(),
                "hyper_parameters": dict(model.hparams),
                "lightship": {"version": VERSIONS["checkpoint"]},
            }
        )
    )


def _state_dict() -> bytes:
    buffer = io.BytesIO()
    torch.save(build_net("litcnn", 3, 16).state_dict(), buffer)
    return buffer.getvalue()


def _safetensors() -> bytes:
    return safetensors.torch.save(build_net("litcnn", 3, 16).state_dict())


def _rows() -> bytes:
    rows = [["a.png", [["ant", 0.5], ["bee", 0.5]]]] * 2 + [["b.png", "b.png: damaged"]]
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


TARGETS = [
    *(Target(name, seeds, _decode, max_mib=128) for name, seeds in IMAGES.items()),
    *SOURCES,
    *RUNS,
]
