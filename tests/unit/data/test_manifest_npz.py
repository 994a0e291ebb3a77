"""Manifests of version 0.1.0 are read, and what no scan makes is refused."""

import contextlib
import dataclasses
import io
import json
import random
from typing import Any

import numpy as np
import pytest

from lightship import storage
from lightship.data.manifest import Manifest
from lightship.data.manifest_npz import load_manifests
from lightship.errors import DataError
from lightship.versions import NewerVersion
from tests.support.older_manifest import save_manifests
from tests.unit.data.test_manifest import COLUMNS, assert_same, manifest_of
from tests.unit.data.test_manifest_table import WRONG_CLASSES


def test_saved_manifests_come_back_the_same(tmp_path):
    saved = {"train": manifest_of([0, 1, -1, 1, 2]), "test": manifest_of([2, 2], classes=3)}
    url = str(tmp_path / "data" / "manifest.npz")
    save_manifests(url, saved)
    loaded = load_manifests(url)
    assert list(loaded) == ["train", "test"]
    for split in saved:
        assert_same(loaded[split], saved[split])


def test_a_large_manifest_is_saved_in_a_few_bytes_a_sample():
    n = 200_000
    labels = np.arange(n) // 200
    large = dataclasses.replace(
        manifest_of([0]),
        files=[f"train/n{label:08d}/n{label:08d}_{i}.JPEG" for i, label in enumerate(labels)],
        file_index=np.arange(n, dtype=np.int32),
        offset=np.zeros(n, dtype=np.int64),
        length=np.random.default_rng(0).integers(20_000, 200_000, n),
        label=labels,
        crc32=np.full(n, -1),
        class_names=[str(i) for i in range(1000)],
    )
    save_manifests("memory://large.npz", {"train": large})
    assert storage.size_bytes("memory://large.npz") < 12 * n
    assert_same(load_manifests("memory://large.npz")["train"], large)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a zip", "cut", "changed", "pickle"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    url = str(tmp_path / "m.npz")
    save_manifests(url, {"train": manifest_of([0, 1])})
    whole = storage.read_bytes(url)
    if damage == "cut":
        damage = whole[: len(whole) // 2]
    elif damage == "changed":  # a valid .npz whose table is not what was saved
        arrays = dict(np.load(io.BytesIO(whole)))
        arrays["train.label"] = arrays["train.label"][::-1]
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        damage = buffer.getvalue()
    elif damage == "pickle":
        buffer = io.BytesIO()
        np.savez(buffer, header=np.array([{"format": 1}], dtype=object))
        damage = buffer.getvalue()
    storage.write_bytes(url, damage)
    with pytest.raises(DataError, match=r"m\.npz"):
        load_manifests(url)


def saved_as(url: str, header: Any, **arrays: np.ndarray) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    buffer = io.BytesIO()
    np.savez(buffer, header=np.frombuffer(raw, dtype=np.uint8), **arrays)
    storage.write_bytes(url, buffer.getvalue())


@pytest.mark.parametrize("splits", [{}, {"train": "of another kind"}, None])
def test_a_newer_version_is_refused_by_its_version(tmp_path, splits):
    url = str(tmp_path / "m.npz")
    saved_as(url, {"format": 2, "splits": splits})
    with pytest.raises(NewerVersion, match=r"m\.npz has version 2 .*upgrade lightship"):
        load_manifests(url)


WRONG_HEADERS: dict[str, Any] = {
    "a list": [1],
    "text": "x",
    "null": None,
    "without splits": {"format": 1},
    "no split": {"format": 1, "splits": {}},
    "splits are a list": {"format": 1, "splits": [1]},
    "a split is text": {"format": 1, "splits": {"train": "x"}},
    "a split that has no table": {"format": 1, "splits": {"val": {}}},
    "not UTF-8": b"\xff\xfe",
    "nested": b"[" * 100_000,
}
WRONG_ABOUT: dict[str, Any] = {
    "root": 1, "class_names": ["a", 1], "container": "zip", "encoding": ["image"],
    "fingerprint": None,
}  # fmt: skip
WRONG_COLUMNS: dict[str, tuple[str, Any]] = {
    "negative offset": ("offset", [0, -1, 5]),
    "negative length": ("length", [-5, 1, 5]),
    "offset above int64": ("offset", np.array([0, 2**64 - 1, 5], dtype=np.uint64)),
    "label out of range": ("label", [0, 1, 3]),
    "label below -1": ("label", [0, 1, -2]),
    "label above int64": ("label", np.array([0, 2**64 - 1, 5], dtype=np.uint64)),
    "no such file": ("file_index", [0, 0, 1]),
    "negative file": ("file_index", [0, 0, -1]),
    "fractions": ("length", [1.5, 1.0, 2.0]),
    "text": ("label", ["a", "b", "c"]),
    "two axes": ("label", [[0], [1], [2]]),
    "one sample less": ("crc32", [-1, -1]),
    "files not UTF-8": ("files", np.array([255, 254], dtype=np.uint8)),
}


def parts_of(manifest: Manifest) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    about = {name: getattr(manifest, name) for name in ("root", "class_names", "container")}
    arrays = {f"train.{column}": getattr(manifest, column) for column in COLUMNS}
    arrays["train.files"] = np.frombuffer("\0".join(manifest.files).encode(), dtype=np.uint8)
    about |= {"encoding": manifest.encoding, "fingerprint": manifest.fingerprint()}
    return about, arrays


def test_a_file_of_these_parts_is_read(tmp_path):
    about, arrays = parts_of(manifest_of([0, 1, 2]))
    url = str(tmp_path / "m.npz")
    saved_as(url, {"format": 1, "splits": {"train": about}, "new": 1}, **arrays)
    assert_same(load_manifests(url)["train"], manifest_of([0, 1, 2]))


@pytest.mark.parametrize("case", [*WRONG_HEADERS, *WRONG_ABOUT, *WRONG_COLUMNS])
def test_what_no_scan_makes_is_refused_even_with_its_fingerprint(tmp_path, case):
    table = manifest_of([0, 1, 2])
    about, arrays = parts_of(table)
    if case in WRONG_ABOUT:
        about[case] = WRONG_ABOUT[case]
    if case in WRONG_COLUMNS:
        column, values = WRONG_COLUMNS[case]
        arrays[f"train.{column}"] = np.asarray(values)
        with contextlib.suppress(Exception):  # no fingerprint of text
            changed = dataclasses.replace(table, **{column: np.asarray(values)})
            about["fingerprint"] = changed.fingerprint()
    url = str(tmp_path / "m.npz")
    header = WRONG_HEADERS.get(case, {"format": 1, "splits": {"train": about}})
    saved_as(url, header, **arrays)
    with pytest.raises(DataError, match=r"m\.npz") as error:
        load_manifests(url)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("case", WRONG_CLASSES)
def test_class_names_that_no_scan_gives_are_refused(tmp_path, case):
    url, table = str(tmp_path / "m.npz"), manifest_of([0, 1, 2])
    save_manifests(url, {"train": dataclasses.replace(table, class_names=WRONG_CLASSES[case])})
    with pytest.raises(DataError, match=r"m\.npz.*class") as error:
        load_manifests(url)
    assert len(str(error.value)) < 400


def test_splits_of_different_classes_are_refused(tmp_path):
    url, table = str(tmp_path / "m.npz"), manifest_of([0, 1, 2])
    other = dataclasses.replace(table, class_names=["class 1", "class 0", "class 2"])
    save_manifests(url, {"train": table, "test": other})
    with pytest.raises(DataError, match="splits of different classes"):
        load_manifests(url)


def test_damaged_bytes_are_refused(tmp_path):
    url, rng = str(tmp_path / "m.npz"), random.Random(0)
    save_manifests(url, {"train": manifest_of([0, 1, 2] * 9)})
    whole = storage.read_bytes(url)
    for _ in range(200):
        changed = bytearray(whole)
        for place in rng.sample(range(len(whole)), 2):
            changed[place] = rng.randrange(256)
        storage.write_bytes(url, bytes(changed))
        with contextlib.suppress(DataError, NewerVersion):
            assert_same(load_manifests(url)["train"], manifest_of([0, 1, 2] * 9))
