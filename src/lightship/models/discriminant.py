"""Linear discriminant analysis: a head in closed form, for sets that are too large to iterate."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightship.models.logistic import Fit, folds

SHRINKAGES = (0.9, 0.5, 0.2, 0.05)
"""Parts of the diagonal in the covariance that are tried."""
_USUAL = 0.2
_SCALES = (1.0, 0.5, 0.25, 0.125, 0.0625)
"""Factors of the weights that are tried: shrunk weights are too sure of themselves."""
_CHUNK_ROWS = 4096
_MAX_SCORES = 2**24
"""Scores (held-out rows x classes) by which the shrinkage is chosen; 128 MiB."""


def fit_discriminant(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    sample_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
) -> Fit:
    """Classes as Gaussians with one covariance, shrunk to its diagonal (Friedman 1989, RDA).

    Time is proportional to N D^2 + C D^2, memory to C D + D^2 beside the features. Shrinkage and
    scale of the weights are those of the lowest loss on held-out samples; the scale is part of the
    weights. Products are in float64. A pure function of its arguments, for one number of threads.

    Args:
        features: [N, D] float32.
        labels: [N] int64.
        num_classes: C.
        sample_weights: [N] float64; they change the prior of classes. None: all 1.
        class_weights: [C], likewise.

    Returns:
        `strength` is the shrinkage.
    """
    if sample_weights is None:
        sample_weights = torch.ones(len(labels), dtype=torch.float64)
    prior = torch.bincount(labels, sample_weights, minlength=num_classes)
    if class_weights is not None:
        prior = prior * class_weights.cpu()
    log_prior = ((prior + 1) / (prior.sum() + num_classes)).log()  # also where there is no sample
    center = features.mean(0, dtype=torch.float64)
    held_out = next(folds(labels), None)
    if held_out is None:
        moments = _moments(features, labels, center, num_classes)
        best = _USUAL, _SCALES[1], float("nan")
    else:
        rest = _moments(features[~held_out], labels[~held_out], center, num_classes)
        shown = held_out.nonzero()[:, 0]
        count = min(len(shown), max(1, _MAX_SCORES // num_classes))
        shown = shown[torch.linspace(0, len(shown) - 1, count, dtype=torch.float64).long()]
        best = _best(rest, features[shown].double() - center, labels[shown], log_prior)
        of_held_out = _moments(features[held_out], labels[held_out], center, num_classes)
        moments = _Moments(*(a + b for a, b in zip(rest, of_held_out, strict=True)))
    shrinkage, scale, accuracy = best
    weight, offset = _solve(moments, shrinkage)
    bias = scale * (offset - weight @ center) + log_prior
    return Fit(scale * weight, bias, shrinkage, accuracy)


class _Moments(NamedTuple):
    """Sums over samples around one center: they can be added.

    Attributes:
        counts: [C] float64 samples of a class.
        sums: [C, D] float64 of a class's values.
        products: [D, D] float64.
    """

    counts: Tensor
    sums: Tensor
    products: Tensor


def _moments(features: Tensor, labels: Tensor, center: Tensor, num_classes: int) -> _Moments:
    width = features.shape[1]
    sums = torch.zeros(num_classes, width, dtype=torch.float64)
    products = torch.zeros(width, width, dtype=torch.float64)
    for rows, of in zip(features.split(_CHUNK_ROWS), labels.split(_CHUNK_ROWS), strict=True):
        values = rows.double() - center
        sums.index_add_(0, of, values)
        products.addmm_(values.T, values)
    return _Moments(labels.bincount(minlength=num_classes).double(), sums, products)


def _solve(moments: _Moments, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Weights [C, D] and offsets [C] of centred values, without the prior."""
    counts, sums, products = moments
    means = sums / counts.clamp(min=1)[:, None]
    covariance = (products - means.T @ sums) / counts.sum()
    std = (products.diagonal() / counts.sum()).sqrt()
    std = torch.where(std > 1e-6 * std.max().clamp(min=1e-30), std, torch.inf)
    shrunk = (1 - shrinkage) * covariance / std / std[:, None]
    shrunk.diagonal().add_(shrinkage)
    weight = torch.cholesky_solve((means / std).T, torch.linalg.cholesky(shrunk)).T / std
    return weight, -0.5 * (means * weight).sum(1)


def _best(
    moments: _Moments, values: Tensor, labels: Tensor, log_prior: Tensor
) -> tuple[float, float, float]:
    """(shrinkage, scale, accuracy) of the lowest loss on held-out, centred values."""
    found = []
    for shrinkage in SHRINKAGES:
        weight, offset = _solve(moments, shrinkage)
        scores = values @ weight.T + offset
        for scale in _SCALES:
            scaled = scale * scores + log_prior
            accuracy = float((scaled.argmax(1) == labels).double().mean())
            loss = torch.nn.functional.cross_entropy(scaled, labels)
            found.append((float(loss), shrinkage, scale, accuracy))
    return min(found)[1:]
