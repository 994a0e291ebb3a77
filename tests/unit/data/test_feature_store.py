from pathlib import Path

import numpy as np
import pytest

from lightship.data import feature_store
from lightship.data.feature_store import FeatureStore, Rows

KEY, OTHER = "0" * 32, "1" * 32
ROWS = Rows(
    np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32),
    np.array([0, 1, 2, -1, 0, 1, 2, 0, 1, 2]),
)

LABELS = np.array([0, 1, 2, 2, 0, 1, 2, 0, 1, 2])
"""Of the samples; the fourth image cannot be read."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_store, "ROWS", 4)
    monkeypatch.setattr(feature_store, "_AT_ROWS", (slice(None, 4), slice(4, None)))


def fill(store: FeatureStore, first: int, end: int, at_once: int = 3) -> None:
    for start in range(first, end, at_once):
        part = slice(start, min(start + at_once, end))
        store.append(Rows(ROWS.values[part], ROWS.labels[part]))


def test_rows_of_unreadable_images_are_added_again(tmp_path: Path) -> None:
    """The fourth image has been repaired since; the others come as in a first start."""
    fill(FeatureStore(str(tmp_path), KEY, LABELS), 0, 7)
    store = FeatureStore(str(tmp_path), KEY, LABELS)
    kept, again = store.load()
    assert (kept, again.tolist()) == (4, [3])
    repaired = Rows(ROWS.values[3:4] + 1, np.array([2]))
    store.append(Rows(*(np.concatenate([a, b[4:6]]) for a, b in zip(repaired, ROWS, strict=True))))
    fill(store, 6, 10)
    found = store.rows()
    np.testing.assert_array_equal(found.labels, [0, 1, 2, 2, 0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(found.values[3], ROWS.values[3] + 1)
    rest = [0, 1, 2, 4, 5, 6, 7, 8, 9]
    np.testing.assert_array_equal(found.values[rest], ROWS.values[rest])


def test_goes_on_after_the_last_whole_part(tmp_path: Path) -> None:
    store = FeatureStore(str(tmp_path), KEY, LABELS)
    assert store.load()[0] == 0
    fill(store, 0, 7)
    again = FeatureStore(str(tmp_path), KEY, LABELS)
    assert again.load()[0] == 4
    fill(again, 3, 4)
    fill(again, 4, 10)
    for rows in (again.rows(), _loaded(tmp_path)):
        np.testing.assert_array_equal(rows.values, ROWS.values)
        np.testing.assert_array_equal(rows.labels, ROWS.labels)


def _loaded(folder: Path) -> Rows:
    store = FeatureStore(str(folder), KEY, LABELS)
    assert store.load()[0] == 10
    return store.rows()


def test_another_key_replaces_what_is_there_and_touches_nothing_else(tmp_path: Path) -> None:
    fill(FeatureStore(str(tmp_path), OTHER, LABELS), 0, 10)
    (tmp_path / "mine.npz").write_bytes(b"")
    assert FeatureStore(str(tmp_path), KEY, LABELS).load()[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine.npz"]


@pytest.mark.parametrize("damage", ["cut", "byte", "text", "other", "newer", "shorter", "wider"])
def test_a_damaged_part_is_computed_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as newer:
        if damage == "newer":
            newer.setitem(feature_store.versions.VERSIONS, "features", 2)
        fill(FeatureStore(str(tmp_path), KEY, LABELS), 0, 10)
    second = tmp_path / f"{KEY}-00001.npz"
    data = bytearray(second.read_bytes())
    if damage == "cut":
        second.write_bytes(data[:-20])
    elif damage == "byte":
        at = data.find(ROWS.values[5].tobytes())
        data[at] ^= 1
        second.write_bytes(data)
    elif damage == "text":
        second.write_bytes(b"none")
    elif damage == "other":
        second.write_bytes(data.replace(KEY.encode(), OTHER.encode()))
    elif damage == "shorter":
        second.write_bytes((tmp_path / f"{KEY}-00002.npz").read_bytes())
    elif damage == "wider":
        wider = Rows(np.zeros((4, 5), np.float32), ROWS.labels[4:8])
        second.write_bytes(feature_store._packed(wider, KEY))
    store = FeatureStore(str(tmp_path), KEY, LABELS)
    kept, again = store.load()
    assert kept == (0 if damage == "newer" else 4)
    fill(store, 3, 3 + len(again))
    fill(store, kept, 10)
    np.testing.assert_array_equal(_loaded(tmp_path).values, ROWS.values)


@pytest.mark.parametrize("label", [2**40, -7, 3, 0])
@pytest.mark.parametrize("row", [5, 9])
def test_a_part_with_labels_of_other_samples_is_computed_again(
    label: int, row: int, tmp_path: Path
) -> None:
    fill(FeatureStore(str(tmp_path), KEY, LABELS), 0, 10)
    labels = ROWS.labels.copy()
    labels[row] = label
    part = slice(row // 4 * 4, row // 4 * 4 + 4)
    forged = feature_store._packed(Rows(ROWS.values[part], labels[part]), KEY)
    (tmp_path / f"{KEY}-{row // 4:05d}.npz").write_bytes(forged)
    store = FeatureStore(str(tmp_path), KEY, LABELS)
    kept, again = store.load()
    assert kept == row // 4 * 4
    fill(store, 3, 3 + len(again))
    fill(store, kept, 10)
    np.testing.assert_array_equal(_loaded(tmp_path).labels, ROWS.labels)
