import numpy as np
import pytest

from lightship.data.feature_store import Rows
from lightship.models.losses import TrainingLoss
from lightship.training.callbacks import head_init
from lightship.training.features import MAX_TOTAL, balanced_ids


@pytest.mark.parametrize(
    ("classes", "expected"), [(100, 200), (1000, 50), (4000, 25), (20_000, 5), (120_000, 1)]
)
def test_images_of_many_classes_are_bounded(classes: int, expected: int) -> None:
    labels = np.repeat(np.arange(classes), 300 if classes < 10_000 else 8)
    counts = np.bincount(labels[balanced_ids(labels)], minlength=classes)
    assert set(counts) == {expected}
    assert counts.sum() <= max(MAX_TOTAL, classes)


@pytest.mark.parametrize(("bound", "name"), [(3000, "L2 "), (2999, "linear discriminant analysis")])
def test_too_much_for_logistic_regression_is_solved_in_closed_form(
    bound: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_init, "MAX_PRODUCTS", bound)
    labels = np.arange(100) % 5
    values = np.eye(6, dtype=np.float32)[labels]
    values += np.random.default_rng(0).normal(0, 0.1, values.shape).astype(np.float32)
    weight, bias, line = head_init._fitted(Rows(values, labels), labels, 5, TrainingLoss())
    assert ((values @ weight.T + bias).argmax(1) == labels).all()
    assert name in line
    assert ("100 images x 6 features x 5 classes" in line) == (bound < 3000)
    assert line.endswith("held-out accuracy 1.000")
