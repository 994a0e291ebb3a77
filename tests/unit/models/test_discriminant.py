import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.nn import functional as F

from lightship.models import discriminant
from lightship.models.discriminant import fit_discriminant
from lightship.models.logistic import fit_logistic
from tests.support.allocations import LargestTensor


def gaussians(count: int, width: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features that depend on each other, one of which never changes."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    labels = torch.arange(count) % classes
    values = centres[labels] + 0.7 * torch.randn(count, width, generator=generator)
    values = values @ mixing * torch.logspace(-2, 2, width) + 5
    values[:, 1] = 3
    return values, labels


def test_it_is_scikit_learns_without_shrinkage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discriminant, "SHRINKAGES", (1e-9,))
    monkeypatch.setattr(discriminant, "_SCALES", (1.0,))
    values, labels = gaussians(2000, 8, 5)
    labels[labels == 4] = (torch.arange(400) % 5).clamp(min=3)
    fit = fit_discriminant(values, labels, 5)
    changing = torch.tensor([0, 2, 3, 4, 5, 6, 7])
    expected = LinearDiscriminantAnalysis(solver="lsqr").fit(values[:, changing], labels)
    scores = values.double() @ fit.weight.T + fit.bias
    shares = expected.predict_proba(values[:, changing].numpy())
    np.testing.assert_allclose(
        scores.softmax(1).numpy(), shares, atol=4e-3
    )  # 1 is added to the prior
    assert fit.weight[:, 1].abs().max() == 0


def test_others_are_told_apart_as_by_logistic_regression() -> None:
    """And the probabilities are honest: their loss is near that of the regression."""
    values, labels = gaussians(6000, 30, 12)
    seen, others = slice(0, 1200), slice(1200, None)
    losses, hits = [], []
    for fit in (fit_logistic, fit_discriminant):
        found = fit(values[seen], labels[seen], 12)
        scores = values[others].double() @ found.weight.T + found.bias
        losses.append(float(F.cross_entropy(scores, labels[others])))
        hits.append(float((scores.argmax(1) == labels[others]).double().mean()))
        assert found.accuracy == pytest.approx(hits[-1], abs=0.06)
    assert hits[1] > hits[0] - 0.02, (hits, losses)
    assert losses[1] < losses[0] + 0.05, (hits, losses)


def test_many_classes_need_no_array_of_images_times_classes() -> None:
    values, labels = gaussians(15000, 24, 3000)
    with LargestTensor() as largest:
        fit_discriminant(values, labels, 3000)
    assert largest.numel <= discriminant._MAX_SCORES < 15000 * 3000


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 0, 0, 1], [2, 2]])
def test_few_samples_and_missing_classes(labels: list[int]) -> None:
    values = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(0))
    fit = fit_discriminant(values, torch.tensor(labels), 3, class_weights=torch.ones(3))
    assert torch.isfinite(fit.weight).all()
    assert torch.isfinite(fit.bias).all()
    assert (values.double() @ fit.weight.T + fit.bias).argmax(1).tolist() == labels
