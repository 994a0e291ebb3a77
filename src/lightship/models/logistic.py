"""Multinomial logistic regression with an L2 penalty: a head fitted on features."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_PRODUCTS = 10**10
"""Rows x width x classes of a set that is not too large: an evaluation takes 4 times as many
operations, and a fit up to some hundred evaluations."""
STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""Factors of the squared weights that are tried, the strongest first."""
_USUAL = 0.03
_FOLDS, _ALL_FOLDS_BELOW = 5, 1000
_MAX_ITERATIONS = 150
_HISTORY = 20
"""Steps that L-BFGS remembers: each takes twice the memory of the weights."""
_CHUNK_SCORES = 2**22
"""Scores (rows x classes) that are in memory at once; 32 MiB."""


class Fit(NamedTuple):
    """A fitted head.

    Attributes:
        weight: [C, D] float64.
        bias: [C] float64.
        strength: Factor of the squared weights.
        accuracy: On samples that were held out to choose it; NaN if there were too few.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    accuracy: float


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    sample_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Fit:
    """Minimize the mean cross-entropy plus `strength` times the squared weights, in float64.

    The features are standardized. The strength is the one with the lowest loss on held-out samples
    (a fifth of each class; of small sets each fifth in turn); then all samples are used. L-BFGS on
    the principal components, each divided by the root of its curvature, takes 7 to 70 evaluations
    of the loss for each strength and each fifth, 200 for all of a set of 2,000; each has 4 N D C
    operations. Memory is proportional to N D + D C. A pure function of its arguments, for one
    number of threads.

    Args:
        features: [N, D] float32.
        labels: [N] int64.
        num_classes: C.
        sample_weights: [N] float64 of mean 1; None: all 1.
        label_smoothing: Of the loss.
        class_weights: [C] of the loss (see `TrainingLoss`); None: all 1.
    """
    values = features.double()
    mean, std = values.mean(0), values.std(0, correction=0)
    std = torch.where(std > 1e-6 * std.max().clamp(min=1e-30), std, torch.inf)
    values = (values - mean) / std
    directions, variance = _principal(values)
    if sample_weights is None:
        sample_weights = torch.ones(len(labels), dtype=torch.float64)
    if class_weights is None:
        class_weights = torch.ones(num_classes)
    rows = _Rows(values @ directions, labels, sample_weights)
    loss = _Loss(class_weights.cpu().double(), label_smoothing)
    strength, accuracy = _best_strength(rows, loss, variance)
    weight, bias = _minimize(rows, loss, variance, strength, None, 1e-7)
    weight = directions @ weight / std[:, None]
    return Fit(weight.T.contiguous(), bias - mean @ weight, strength, accuracy)


class _Rows(NamedTuple):
    """Samples.

    Attributes:
        components: [N, R] float64.
        labels: [N] int64.
        weights: [N] float64.
    """

    components: Tensor
    labels: Tensor
    weights: Tensor

    def where(self, mask: Tensor) -> "_Rows":
        """Those of a mask [N]."""
        return _Rows(*(column[mask] for column in self))

    def chunks(self, size: int) -> "Iterator[_Rows]":
        """Of at most `size` rows."""
        return (_Rows(*columns) for columns in zip(*(c.split(size) for c in self), strict=True))


class _Loss(NamedTuple):
    """Weighted cross-entropy to smoothed labels, as torch's.

    Attributes:
        class_weights: [C] float64.
        smoothing: Probability mass spread over all classes.
    """

    class_weights: Tensor
    smoothing: float

    def sum(
        self, rows: _Rows, weight: Tensor, bias: Tensor, gradients: tuple[Tensor, Tensor] | None
    ) -> float:
        """Sum over rows; its gradients are added to those given, of weight [R, C] and bias [C]."""
        total, num_classes = 0.0, len(self.class_weights)
        spread = self.class_weights * (self.smoothing / num_classes)
        for part in rows.chunks(max(1, _CHUNK_SCORES // num_classes)):
            log_shares = torch.addmm(bias, part.components, weight).log_softmax(1)
            at_label = part.weights * self.class_weights[part.labels] * (1 - self.smoothing)
            found = log_shares.gather(1, part.labels[:, None])[:, 0]
            total -= float(found @ at_label)
            if self.smoothing:
                total -= float(part.weights @ (log_shares @ spread))
            if gradients is None:
                continue
            mass = at_label + part.weights * spread.sum()
            error = log_shares.exp_().mul_(mass[:, None])
            error.scatter_add_(1, part.labels[:, None], -at_label[:, None])
            if self.smoothing:
                error.addr_(part.weights, spread, alpha=-1)
            gradients[0].addmm_(part.components.T, error)
            gradients[1].add_(error.sum(0))
        return total


def _principal(values: Tensor) -> tuple[Tensor, Tensor]:
    """Principal directions [D, R] of centred values [N, D] and the variance along each, [R]."""
    count, width = values.shape
    if count >= width:
        variance, directions = torch.linalg.eigh(values.T @ values / count)
        kept = variance > 1e-10 * variance[-1]
        return directions[:, kept], variance[kept]
    variance, samples = torch.linalg.eigh(values @ values.T / count)
    kept = variance > 1e-10 * variance[-1]
    variance = variance[kept]
    return values.T @ samples[:, kept] / (variance * count).sqrt(), variance


def _best_strength(rows: _Rows, criterion: _Loss, variance: Tensor) -> tuple[float, float]:
    """The strength of the lowest held-out loss, and the accuracy there."""
    held = list(folds(rows.labels))
    if not held:
        return _USUAL, float("nan")
    starts: list[tuple[Tensor, Tensor] | None] = [None] * len(held)
    best = (float("inf"), _USUAL, float("nan"))
    for strength in STRENGTHS:
        loss, hits, count = 0.0, 0.0, 0
        for number, held_out in enumerate(held):
            rest, start = rows.where(~held_out), starts[number]
            starts[number] = weight, bias = _minimize(
                rest, criterion, variance, strength, start, 1e-4
            )
            others = rows.where(held_out)
            loss += criterion.sum(others, weight, bias, None)
            hits += _hits(others, weight, bias)
            count += len(others.labels)
        if loss >= best[0]:
            break  # the loss has one minimum
        best = (loss, strength, hits / count)
    return best[1], best[2]


def _hits(rows: _Rows, weight: Tensor, bias: Tensor) -> int:
    parts = rows.chunks(max(1, _CHUNK_SCORES // len(bias)))
    scores = ((torch.addmm(bias, part.components, weight), part.labels) for part in parts)
    return sum(int((each.argmax(1) == labels).sum()) for each, labels in scores)


def folds(labels: Tensor) -> Iterator[Tensor]:
    """Masks [N] of held-out samples: a fifth of each class that has so many."""
    # RandomState, because NumPy promises its stream for ever.
    shuffled = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    number = torch.empty_like(labels)
    number[by_class] = (torch.arange(len(labels)) - first) % _FOLDS
    is_spare = (counts >= _FOLDS)[labels]
    for fold in range(_FOLDS if len(labels) < _ALL_FOLDS_BELOW else 1):
        held_out = is_spare & (number == fold)
        if held_out.any():
            yield held_out


def _minimize(
    rows: _Rows,
    criterion: _Loss,
    variance: Tensor,
    strength: float,
    start: tuple[Tensor, Tensor] | None,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Weights [R, C] and bias [C].

    Args:
        start: Where to start from; None: zeros.
        tolerance: Of the largest gradient at the end.
    """
    num_classes, count = len(criterion.class_weights), len(rows.labels)
    # Curvature of the loss along a component: p (1 - p) times its variance, and the penalty's.
    scale = (variance * (num_classes - 1) / num_classes**2 + 2 * strength).rsqrt()[:, None]
    if start is None:
        start = torch.zeros(len(scale), num_classes), torch.zeros(num_classes)
    weight = (start[0].double() / scale).requires_grad_()
    bias = start[1].double().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MAX_ITERATIONS,
        history_size=_HISTORY,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def loss_and_gradients() -> Tensor:
        scaled = weight * scale
        of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        loss = criterion.sum(rows, scaled, bias, (of_weight, of_bias)) / count
        weight.grad = (of_weight / count + 2 * strength * scaled) * scale
        bias.grad = of_bias / count
        return torch.tensor(loss, dtype=torch.float64) + strength * scaled.square().sum()

    optimizer.step(loss_and_gradients)
    return weight.detach() * scale, bias.detach()
