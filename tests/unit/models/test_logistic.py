import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from lightship.models import logistic
from lightship.models.logistic import STRENGTHS, fit_logistic
from tests.support.allocations import LargestTensor


def clusters(count: int, width: int, apart: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    """Unequal classes of features with unequal scales, one of which never changes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (count,), generator=generator).clamp(max=5) % 4
    centres = torch.randn(4, width, generator=generator)
    values = apart * centres[labels] + torch.randn(count, width, generator=generator)
    values *= torch.logspace(-2, 2, width)
    values[:, 1] = 3.0
    return values + 5, labels


@pytest.mark.parametrize(("count", "width"), [(240, 12), (60, 150)])
def test_it_is_the_optimum_that_scikit_learn_finds(count: int, width: int) -> None:
    values, labels = clusters(count, width)
    weights = torch.rand(count, generator=torch.Generator().manual_seed(1)).double() + 0.5
    fit = fit_logistic(values, labels, 4, weights / weights.mean())
    assert fit.strength in STRENGTHS
    mean, std = values.double().mean(0), values.double().std(0, correction=0)
    std[1] = 1
    normal = (values.double() - mean) / std
    expected = LogisticRegression(C=1 / (2 * fit.strength * count), tol=1e-9, max_iter=9999).fit(
        normal.numpy(), labels.numpy(), (weights / weights.mean()).numpy()
    )
    scores = values.double() @ fit.weight.T + fit.bias
    shares = expected.predict_proba(normal.numpy())
    np.testing.assert_allclose(scores.softmax(1).numpy(), shares, atol=2e-4)
    assert fit.weight[:, 1].abs().max() == 0, "what never changes has no weight"


def test_the_strength_suits_samples_that_were_held_out() -> None:
    """Chosen on 200, it is better than chance on others; weaker ones are worse."""
    values, labels = clusters(1200, 120, apart=0.1)
    fit = fit_logistic(values[:200], labels[:200], 4)
    weak = LogisticRegression(C=1 / (2 * STRENGTHS[-1] * 200), max_iter=9999)
    mean, std = values[:200].mean(0), values[:200].std(0, correction=0)
    std[1] = 1
    normal = ((values - mean) / std).numpy()
    weak.fit(normal[:200], labels[:200].numpy())
    scores = values[200:].double() @ fit.weight.T + fit.bias
    loss = float(F.cross_entropy(scores, labels[200:]))
    shares = torch.from_numpy(weak.predict_proba(normal[200:])).double()
    assert loss < F.nll_loss(shares.log(), labels[200:]) - 0.3
    others = torch.bincount(labels).double() / len(labels)
    assert loss < -(others * others.log()).sum()
    assert fit.strength > STRENGTHS[-1]
    assert 0.25 < fit.accuracy < 0.9


@pytest.mark.parametrize("weights", [None, [0.4, 1.7, 0.9, 2.2]])
def test_smoothed_labels_are_the_loss_that_is_minimized(weights: list[float] | None) -> None:
    values, labels = clusters(150, 6)
    class_weights = None if weights is None else torch.tensor(weights)
    fit = fit_logistic(values, labels, 4, label_smoothing=0.2, class_weights=class_weights)
    weight, bias = fit.weight.requires_grad_(), fit.bias.requires_grad_()
    normal = values.double()
    std = normal.std(0, correction=0)
    std[1] = 0
    each = F.cross_entropy(
        normal @ weight.T + bias, labels, None if weights is None else class_weights.double(),
        label_smoothing=0.2, reduction="sum",
    )  # fmt: skip
    loss = each / len(labels)
    (loss + fit.strength * (weight * std).square().sum()).backward()
    assert bias.grad is not None
    assert weight.grad is not None
    assert bias.grad.abs().max() < 1e-5
    assert (weight.grad[:, 2:] / std[2:]).abs().max() < 1e-4


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 0, 0, 1], [2, 2]])
def test_few_samples_and_missing_classes(labels: list[int]) -> None:
    values = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(0))
    fit = fit_logistic(values, torch.tensor(labels), 3)
    assert torch.isfinite(fit.weight).all()
    assert torch.isfinite(fit.bias).all()
    scores = values.double() @ fit.weight.T + fit.bias
    assert scores.argmax(1).tolist() == labels
    assert np.isnan(fit.accuracy), "nothing could be held out"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_scores_of_a_few_rows_at_a_time_give_the_same(
    smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, labels = clusters(1000, 3)
    arguments = (values, labels, 40, torch.linspace(0.5, 1.5, 1000).double(), smoothing)
    whole = fit_logistic(*arguments, class_weights=torch.linspace(0.5, 2, 40))
    monkeypatch.setattr(logistic, "_CHUNK_SCORES", 5000)
    with LargestTensor() as largest:
        parts = fit_logistic(*arguments, class_weights=torch.linspace(0.5, 2, 40))
    assert largest.numel <= 5000, "125 rows of 40 classes; the whole are 40,000"
    assert parts.strength == whole.strength
    shares = [(values.double() @ f.weight.T + f.bias).softmax(1) for f in (whole, parts)]
    torch.testing.assert_close(shares[0], shares[1], rtol=0, atol=1e-4)
