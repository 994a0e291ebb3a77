"""Data sets that are made to exhaust memory, to hang, or to reach out of their root."""

import io
import json
import os
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from lightship import storage
from lightship.config import DataConfig
from lightship.data.manifest import Manifest
from lightship.data.manifest_npz import load_manifests
from lightship.data.manifest_table import write_table
from lightship.data.sample_reader import read_samples
from lightship.data.shards.index import INDEX
from lightship.data.sources import layouts
from lightship.data.splits import load_splits
from lightship.errors import DataError
from lightship.storage.urls import stays_below, stays_inside
from tests.support.bounded_child import call_bounded, call_each, refusals
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
from tests.support.older_manifest import save_manifests

FILES = little_set(("train",))
PNG = FILES["train/ant/000.png"]


def scan(root: str) -> int:
    return sum(map(len, layouts.scan(root).values()))


def read_bad(root: str) -> list[str]:
    manifest = load_splits(DataConfig(root=root, val_fraction=0), None, "train")["train"]
    samples = read_samples(manifest, np.arange(len(manifest)))
    return [str(data) for _, data in samples if isinstance(data, DataError)]


def sparse(path: Path, size: int, head: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)


# ---- files -------------------------------------------------------------------------------------


def test_a_sparse_image_of_40_gib_is_a_bad_sample(tmp_path):
    sparse(Path(put(str(tmp_path), FILES), "train/ant/9.png"), 40 * 2**30, PNG)
    outcome = call_bounded(read_bad, str(tmp_path), max_mib=100)
    (text,) = outcome.result
    assert text.startswith(
        "train/ant/9.png has 42949672960 bytes, more than --data.max_sample_mib 1024"
    )


@pytest.mark.parametrize("layout", ["folder", "tar", "tar.gz", "zip", "parquet"])
def test_max_sample_mib_holds_in_every_layout(tmp_path, layout):
    large = {**FILES, "train/ant/999.png": PNG + bytes(5000)}
    root = {
        "folder": lambda: put(str(tmp_path / "x"), large),
        "tar": lambda: put(str(tmp_path), {"x.tar": tarred(large)}) + "/x.tar",
        "tar.gz": lambda: put(str(tmp_path), {"x.tgz": tarred(large, True)}) + "/x.tgz",
        "zip": lambda: put(str(tmp_path), {"x.zip": zipped(large)}) + "/x.zip",
        "parquet": lambda: put(str(tmp_path / "x"), parquet(large)),
    }[layout]()
    config = DataConfig(root=root, val_fraction=0, max_sample_mib=0.002)
    manifest = load_splits(config, None, "train")["train"]
    samples = dict(read_samples(manifest, np.arange(len(manifest))))
    bad = [str(data) for data in samples.values() if isinstance(data, DataError)]
    assert len(samples) == len(large)
    assert len(bad) == 1
    assert f"has {len(PNG) + 5000} bytes, more than --data.max_sample_mib 0.002" in bad[0]


def test_sparse_lists_and_tables_end_in_a_line(tmp_path):
    shards = webdataset(FILES)
    for name in ("classes.txt", "classes.json", "lightship-index.npz"):
        folder = tmp_path / name
        put(str(folder), {k: v for k, v in shards.items() if k != "classes.txt"})
        sparse(folder / name, 40 * 2**30)
    pixels = cifar_pixels(10)
    cifar = put(str(tmp_path / "c"), cifar10(pixels, pixels))
    sparse(Path(cifar, "cifar-10-batches-py/test_batch"), 40 * 2**30)
    roots = {name: (f"{tmp_path}/{name}",) for name in os.listdir(tmp_path)}
    said = refusals(scan, roots, max_mib=100)
    assert "at most 16,777,216" in said["classes.txt"]
    assert "at most 536870912" in said["c"]


def test_pipes_sockets_and_devices_are_never_opened(tmp_path):
    root = Path(put(str(tmp_path / "x"), FILES))
    os.mkfifo(root / "train/ant/pipe.png")
    os.mkfifo(root / "classes.txt")
    (root / "train/ant/zero.png").symlink_to("/dev/zero")
    (root / "train/ant/pipe2.png").symlink_to("pipe.png")
    here = os.getcwd()
    os.chdir(root)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("socket.png")
            assert call_bounded(read_bad, str(root), max_s=30).result == []
    finally:
        os.chdir(here)
    for path in ("train/ant/pipe.png", "train/ant/zero.png", "socket.png"):
        for read in (storage.read_bytes, storage.open_binary, storage.size_bytes):
            outcome = call_bounded(read, str(root / path), max_s=30, max_mib=50)
            assert outcome.exit_code == 65
            assert "a file was expected" in str(outcome.error) or "socket" in path
    assert refusals(scan, {"root": (str(root / "train/ant/pipe.png"),)}, max_s=30)


# ---- links -------------------------------------------------------------------------------------


def test_a_graph_of_links_ends(tmp_path):
    put(str(tmp_path / "graph"), FILES)
    for i in range(40):
        folder = tmp_path / f"graph/train/d{i}"
        folder.mkdir()
        for side in "ab":
            (folder / side).symlink_to(f"../d{i + 1}")
    put(str(tmp_path / "graph/train"), {"d40/0.png": PNG})
    put(str(tmp_path / "circle"), FILES)
    for i in range(12):
        folder = tmp_path / f"circle/train/ant/{i}"
        folder.mkdir()
        for j in range(12):
            (folder / str(j)).symlink_to(f"../{j}")
    roots = {name: (f"{tmp_path}/{name}",) for name in ("graph", "circle")}
    said = refusals(scan, roots, max_mib=100, max_s=60)
    assert all("on more than 16 ways" in text for text in said.values())


def test_a_folder_may_be_linked_a_few_times(tmp_path):
    put(str(tmp_path), FILES)
    (tmp_path / "val").symlink_to("train")
    (tmp_path / "test").symlink_to("train")
    (tmp_path / "train/ant/up").symlink_to("..")
    assert {name: len(m) for name, m in layouts.scan(str(tmp_path)).items()} == dict.fromkeys(
        ("train", "val", "test"), len(FILES)
    )


# ---- labels and classes ------------------------------------------------------------------------


def shards_of(label: bytes, classes: bytes | None = None) -> Callable[[Path], str]:
    tar = tarred({"a.png": PNG, "a.cls": label, "b.png": PNG, "b.cls": b"0"})
    files = {"x.tar": tar} | ({"classes.txt": classes} if classes is not None else {})
    return lambda folder: put(str(folder), files)


CLASSES: dict[str, Callable[[Path], str]] = {
    "label 50,000,000": shards_of(b"50000000"),
    "label 2^63 - 1": shards_of(b"%d" % (2**63 - 1)),
    "label 2^63": shards_of(b"%d" % 2**63),
    "label -1": shards_of(b"-1"),
    "label of 1 MiB": shards_of(b"x" * 2**20),
    "1,000,000 classes for 2 samples": shards_of(b"1", b"".join(b"%d\n" % i for i in range(10**6))),
    "a class of 1 MiB": shards_of(b"1", b"x\n" + b"y" * 2**20),
    "17 MiB of lines": shards_of(b"1", b"\n" * 17 * 2**20),
}


def test_labels_and_classes_that_attack(tmp_path):
    roots = {name: (make(tmp_path / name),) for name, make in CLASSES.items()}
    said = refusals(scan, roots, max_mib=300, max_s=60)
    assert "at most 100000" in said["1,000,000 classes for 2 samples"]
    assert "at most 1024" in said["a class of 1 MiB"]


# ---- tables of samples -------------------------------------------------------------------------


def npy(shape: str, dtype: str = "<i8", data: bytes = b"") -> bytes:
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header) + 1) + header + b"\n" + data


def table(**changed: Any) -> bytes:
    """An index of one sample, with other members."""
    buffer = io.BytesIO()
    columns = ("file_index", "offset", "length", "label", "crc32")
    members = {f"train.{name}": npy("(1,)", "|i1", b"\0") for name in columns}
    members["train.files"] = npy("(5,)", "|u1", b"x.tar")
    split = {"root": "", "class_names": ["a", "b"], "container": "bytes", "encoding": "image",
             "fingerprint": "0"}  # fmt: skip
    header = json.dumps({"format": 1, "splits": {"train": split}}).encode()
    header = changed.pop("header", header)
    members["header"] = npy(f"({len(header)},)", "|u1", header)
    members |= {name.replace("__", "."): data for name, data in changed.items()}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def wide(count: int) -> bytes:
    """`count` samples in a table of 1/1000 of their bytes."""
    zeros = npy(f"({count},)", "|i1", bytes(count))
    names = ("file_index", "offset", "length", "label", "crc32")
    return table(**{f"train__{name}": zeros for name in names})


def one_sample(**changed: Any) -> dict[str, Manifest]:
    columns = {"file_index": [0], "offset": [512], "length": [9], "label": [0], "crc32": [-1]}
    arrays: Any = {name: np.array(values, "i8") for name, values in columns.items()}
    values: dict[str, Any] = {"files": ["x.tar"], "class_names": ["a", "b"], **arrays, **changed}
    return {"train": Manifest(root="", container="bytes", encoding="image", **values)}


def valid(**changed: Any) -> bytes:
    """A table of 0.1.0 with its right fingerprint."""
    save_manifests("memory://hostile-table", one_sample(**changed))
    return storage.read_bytes("memory://hostile-table")


TABLES: dict[str, Callable[[], bytes]] = {
    "shape of 10^18": lambda: table(train__label=npy(f"({10**18},)")),
    "shape of 10^10 bytes": lambda: table(train__label=npy(f"({10**10},)", "|i1")),
    "negative shape": lambda: table(train__label=npy("(-1,)")),
    "shape of two sides": lambda: table(train__label=npy("(1, 1)", "|i1", b"\0")),
    "shape of code": lambda: table(train__label=npy("__import__('os').abort()")),
    "shape nested": lambda: table(train__label=npy("(" * 4000 + ")" * 4000)),
    "objects": lambda: table(train__label=npy("(1,)", "|O", b"\x80\x02cos\nabort\n)R.")),
    "records": lambda: table(train__label=npy("(1,)", "V8", bytes(8))),
    "floats": lambda: table(train__label=npy("(1,)", "<f8", bytes(8))),
    "header of version 2": lambda: table(train__label=b"\x93NUMPY\2\0\xff\xff\xff\xff"),
    "400 MiB of zeros": lambda: table(train__label=npy("(1,)", "|i1", bytes(400 * 2**20))),
    "50,000,000 samples": lambda: wide(50_000_000),
    "100,000,000 files": lambda: table(train__files=npy(f"({10**8},)", "|u1", bytes(10**8))),
    "nested header": lambda: table(header=b"[" * 2**26),
    "long header": lambda: table(header=b"[],".join([b""] * 2**24)),
    "header of numbers": lambda: table(header=b"9" * 2**20),
}
WRONG: dict[str, dict[str, Any]] = {
    "offset below 0": {"offset": np.array([-512])},
    "length below 0": {"length": np.array([-9])},
    "length 2^61": {"length": np.array([2**61])},
    "file beyond": {"file_index": np.array([7])},
    "label beyond": {"label": np.array([2])},
    "file above": {"files": ["../../x.tar"]},
    "file of another URL": {"files": ["a::http://127.0.0.1:9/x.png"]},
    "absolute file": {"files": ["/etc/passwd"]},
    "file that is not there": {"files": ["gone.tar"]},
    "beyond its shard": {"offset": np.array([10**6])},
}


def test_tables_that_attack(tmp_path):
    roots = {}
    tables = TABLES | {name: partial(valid, **changed) for name, changed in WRONG.items()}
    for name, data in tables.items():
        roots[name] = (
            put(str(tmp_path / name), {"lightship-index.npz": data(), "x.tar": bytes(10240)}),
        )
    said = refusals(scan, roots, max_mib=900, max_s=60)
    assert all("lightship-index.npz" in text for text in said.values())
    assert "not below" in said["file above"]
    assert "not below" in said["file of another URL"]
    assert "not below" in said["absolute file"]


def scan_elsewhere(root: str) -> int:
    """With a node's folder of copies of its own."""
    os.environ["LIGHTSHIP_CACHE"] = f"{root} cache"
    return scan(root)


def test_indexes_that_attack(tmp_path):
    roots = {}
    for name, changed in {**WRONG, "sparse": {}, "no trailer": {}, "right": {}}.items():
        roots[name] = (put(str(tmp_path / name), {"x.tar": bytes(10240)}),)
        write_table(tmp_path / name / INDEX, one_sample(**changed))
    sparse_index = tmp_path / "sparse" / INDEX
    end = sparse_index.read_bytes()
    sparse(sparse_index, 40 * 2**30)
    with sparse_index.open("ab") as file:
        file.write(end)
    sparse(tmp_path / "no trailer" / INDEX, 40 * 2**30)
    assert call_bounded(scan_elsewhere, *roots.pop("right"), max_mib=100).result == 1
    said = refusals(scan_elsewhere, roots, max_mib=100, max_s=60)
    assert all(INDEX in text for text in said.values())
    assert "more than the shards" in said["sparse"]
    assert "not below" in said["file above"]
    assert "not below" in said["file of another URL"]
    assert "not below" in said["absolute file"]
    copied = {path.parts[-3].removesuffix(" cache") for path in tmp_path.glob("* cache/tables/*")}
    assert copied == {"right", "beyond its shard", "file that is not there"}, "by their own columns"


def test_a_right_table_is_read(tmp_path):
    (tmp_path / "x.npz").write_bytes(valid())
    assert len(load_manifests(str(tmp_path / "x.npz"))["train"]) == 1


# ---- names -------------------------------------------------------------------------------------


def test_a_name_in_a_zip_makes_no_request(tmp_path):
    """`a::http://host/x` in a zip would be the URL of an entry of another archive."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_GET = do_HEAD

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        host = f"127.0.0.1:{server.server_port}/y.zip?.png"
        names = (f"http://{host}", f"http:/{host}", f"zip::http:\\\\{host}", "zip::y.png")
        for i, name in enumerate(names):
            path = tmp_path / f"{i}.zip"
            path.write_bytes(zipped({**FILES, f"train/ant/x::{name}": PNG}))
            try:
                manifest = layouts.scan(str(path))["train"]
            except DataError as error:
                assert "read as another URL" in str(error)  # noqa: PT017 (or it is an image)
            else:
                assert not read_each(manifest), "each image is read from the zip"
        server.shutdown()
    assert asked == []


@pytest.mark.parametrize(
    ("url", "path", "below"),
    [
        ("zip://::/x.zip", "a::http://h/y.png", False),
        ("zip://::/x.zip", "a::zip::b.png", False),
        ("zip://::s3://b/x.zip", "a::file:///etc/passwd", False),
        ("zip://::/x.zip", "a::b/0.png", True),
        ("s3://b", "a::http://h/y.png", False),
        ("s3://b", "a/http://h/y.png", True),
        ("/data", "a/../../y.png", False),
        ("/data", "a..b/...png", True),
        ("/data", "data::v2/0.png", True),
        ("s3://b/data", "/cat/x.png", False),
        ("s3://b/data", "cat/", False),
        ("s3://b/data", "/", False),
        ("s3://b/data", "cat//x.png", True),
        ("s3://b/x.tar", "", True),
    ],
)
def test_what_stays_below_a_root(url, path, below):
    assert stays_below(url, path) == below
    assert below or not stays_inside(path)


def test_a_gzip_sample_may_not_unpack_for_ever(tmp_path):
    """Between the scan and the reading a file may be replaced."""
    (tmp_path / "x.tgz").write_bytes(tarred(FILES, gzipped=True))
    manifest = layouts.scan(str(tmp_path / "x.tgz"))["train"]
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(pack.compress(bytes(2**20)) for _ in range(700)) + pack.flush()
    (tmp_path / "x.tgz").write_bytes(bomb)
    outcome = call_each(read_each, {"bomb": (manifest,)}, max_mib=600)["bomb"]
    assert len(outcome.result) == len(FILES)
    assert all("unpacks from" in text for text in outcome.result)


def read_each(manifest: Manifest) -> list[str]:
    samples = read_samples(manifest, np.arange(len(manifest)))
    return [str(data) for _, data in samples if isinstance(data, DataError)]
