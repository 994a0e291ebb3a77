"""The training loss is that of its formula, of torch and of torchvision, row by row."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torchvision.ops import sigmoid_focal_loss

from lightship.data.batch import NOT_COUNTED
from lightship.models.losses import TrainingLoss, balanced_weights, weights_line

WEIGHTS = [0.5, 2.0, 0.0, 1.25]


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Of four classes; the third row does not count."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(9, 4, generator=generator)
    return logits, torch.tensor([0, 1, NOT_COUNTED, 2, 3, 3, 1, 0, 2])


@pytest.mark.parametrize("gamma", [None, 0.0, 0.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_formula(gamma: float | None, smoothing: float, weights: list[float] | None) -> None:
    logits, labels = rows()
    name = "cross_entropy" if gamma is None else "focal"
    loss = TrainingLoss(name, 2.0 if gamma is None else gamma, smoothing, weights)
    expected = []
    for scores, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        exps = np.exp(scores)
        shares, total = exps / exps.sum(), 0.0
        for k, share in enumerate(shares):
            target = smoothing / 4 + (1 - smoothing) * (k == label)
            factor = (1 - share) ** (gamma or 0.0) * (weights or [1] * 4)[k]
            total -= target * factor * np.log(share)
        expected.append(total * (label != NOT_COUNTED))
    found = loss(logits, labels, "none")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert loss(logits, labels, "sum").item() == pytest.approx(sum(expected), rel=1e-5)


def test_without_focus_and_weights_it_is_torchs() -> None:
    logits, labels = rows()
    loss = TrainingLoss("cross_entropy", label_smoothing=0.1, class_weights=WEIGHTS)
    expected = F.cross_entropy(
        logits, labels, torch.tensor(WEIGHTS), ignore_index=NOT_COUNTED, label_smoothing=0.1,
        reduction="sum",
    )  # fmt: skip
    assert torch.equal(loss(logits, labels, "sum"), expected)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
def test_of_two_classes_it_is_torchvisions_focal_loss(gamma: float) -> None:
    scores = torch.linspace(-4, 4, 10)
    labels = torch.tensor([0, 1] * 5)
    logits = torch.stack([torch.zeros(10), scores], dim=1).requires_grad_()
    theirs = scores.clone().requires_grad_()
    expected = sigmoid_focal_loss(theirs, labels.float(), alpha=-1, gamma=gamma)
    found = TrainingLoss("focal", gamma)(logits, labels, "none")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(logits.grad[:, 1], theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0])
def test_a_certain_answer_has_a_finite_gradient(gamma: float) -> None:
    logits = torch.tensor([[90.0, 0.0], [90.0, 0.0]], requires_grad=True)
    TrainingLoss("focal", gamma)(logits, torch.tensor([0, 1]), "sum").backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[0].abs().max() < 1e-30
    assert logits.grad[1, 0] == pytest.approx(1)


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = np.random.default_rng(0).choice(5, 300, p=[0.5, 0.3, 0.1, 0.06, 0.04])
    expected = compute_class_weight("balanced", classes=np.arange(5), y=labels)
    weights = balanced_weights(labels, 5)
    assert weights == pytest.approx(expected)
    assert all(type(weight) is float for weight in weights)
    assert np.mean([weights[label] for label in labels]) == pytest.approx(1)


def test_a_class_without_images_has_weight_0_and_is_named() -> None:
    weights = balanced_weights(np.array([0, 0, 0, 2]), 4)
    assert weights == [4 / (2 * 3), 0.0, 4 / (2 * 1), 0.0]
    assert weights_line(weights, ["ant", "bee", "cat", "dog"]) == (
        "class weights: 0.667 (ant) to 2 (cat); 0 for classes without training images: bee, dog"
    )
    assert weights_line(weights[::2], ["ant", "cat"]) == "class weights: 0.667 (ant) to 2 (cat)"
    few = weights_line([1.0, *[0.0] * 7], list("abcdefgh"))
    assert few.endswith("without training images: b, c, d, e, f, ... (7)")
