import tracemalloc

import numpy as np
import pytest

from lightship.data import columns
from lightship.data.feature_store import Rows
from lightship.data.label_counts import count_labels
from lightship.models.losses import TrainingLoss, balanced_weights
from lightship.training.callbacks import head_init
from lightship.training.features import MAX_TOTAL, balanced_ids


@pytest.mark.parametrize(
    ("classes", "expected"), [(100, 200), (1000, 50), (4000, 25), (20_000, 5), (120_000, 1)]
)
def test_images_of_many_classes_are_bounded(classes: int, expected: int) -> None:
    labels = np.repeat(np.arange(classes), 300 if classes < 10_000 else 8)
    taken = labels[balanced_ids(labels, np.bincount(labels))]
    counts = np.bincount(taken, minlength=classes)
    assert set(counts) == {expected}
    assert counts.sum() <= max(MAX_TOTAL, classes)


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("max_samples", [50, 5000, 100_000])
def test_images_of_a_class_are_evenly_spaced_also_over_pieces(
    max_samples: int, is_sorted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by all ids of each class; class 3 of 8 has no image, class 7 one."""
    monkeypatch.setattr(columns, "_PIECE_ROWS", 1000)
    generator = np.random.default_rng(0)
    labels = generator.choice([0, 1, 2, 4, 5, 6], 30_000, p=[0.5, 0.3, 0.1, 0.08, 0.019, 0.001])
    labels[12_345] = 7
    labels = (np.sort(labels) if is_sorted else labels).astype(np.uint8)
    counts = np.bincount(labels, minlength=8)
    found = balanced_ids(labels, counts, max_samples, min_per_class=1)
    size = max(
        size for size in range(1, counts.max() + 1)
        if np.minimum(counts, size).sum() <= max_samples
    )  # fmt: skip
    expected = []
    for number in range(8):
        ids = np.flatnonzero(labels == number)
        if len(ids):
            expected += ids[np.linspace(0, len(ids) - 1, min(len(ids), size)).astype(int)].tolist()
    assert found.tolist() == sorted(expected)


def test_choosing_images_of_a_million_takes_memory_of_a_piece() -> None:
    """Of half a million; as 64-bit integers all labels would take 8 MB, and their order as much."""
    labels = (np.arange(1_000_000) * 7919 % 1000).astype(np.uint16)
    tracemalloc.start()
    try:
        counts = count_labels(labels, 1000)[1:]
        weights = balanced_weights(labels, 1000)
        ids = balanced_ids(labels, counts)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(ids) == 50_000
    assert weights == [1.0] * 1000
    assert peak_bytes < 8e6


@pytest.mark.parametrize(("bound", "name"), [(3000, "L2 "), (2999, "linear discriminant analysis")])
def test_too_much_for_logistic_regression_is_solved_in_closed_form(
    bound: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_init, "MAX_PRODUCTS", bound)
    labels = np.arange(100) % 5
    values = np.eye(6, dtype=np.float32)[labels]
    values += np.random.default_rng(0).normal(0, 0.1, values.shape).astype(np.float32)
    weight, bias, line = head_init._fitted(
        Rows(values, labels), np.bincount(labels), TrainingLoss()
    )
    assert ((values @ weight.T + bias).argmax(1) == labels).all()
    assert name in line
    assert ("100 images x 6 features x 5 classes" in line) == (bound < 3000)
    assert line.endswith("held-out accuracy 1.000")
