"""The contents of a report as plain values, and the tables and curves made from them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WORST_PAIRS = 20
_CURVE_POINTS = 300
_CURVES = (
    ("Loss", ".3g", (("train", "train/loss"), ("val", "val/loss"))),
    ("Accuracy", ".4g", (("train", "train/acc"), ("val", "val/acc"))),
    ("Means over classes", ".4g", (("balanced acc", "val/balanced_acc"), ("F1", "val/f1"))),
    ("Learning rate", ".3g", (("rate", "lr"),)),
    ("Images per second", ",.0f", (("images/s", "throughput/images_per_s"),)),
    ("Data wait", ".1%", (("share of time", "throughput/data_wait"),)),
    ("Memory", ".3g", (("peak GiB", "memory/max_gib"),)),
)
Point = tuple[float, float]
"""Step and value."""


@dataclass(frozen=True)
class Shown:
    """One evaluated image and its prediction."""

    image: np.ndarray
    """[H, W, 3] uint8, RGB."""
    true: str
    guess: str
    probability: float
    """Of the guess."""
    loss: float | None = None
    path: str = ""
    """Relative to data.root."""


@dataclass(frozen=True)
class Confused:
    """Samples of one class predicted as another."""

    true: str
    guess: str
    count: int
    examples: Sequence[Shown]
    """A few of them, the most confident first."""


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy, in bins of equal width.

    Guo et al. 2017 (arXiv 1706.04599), section 2.

    Attributes:
        count: [bins] samples whose top probability fell in the bin.
        confidence: [bins] mean top probability; 0 in an empty bin.
        accuracy: [bins] share of them that were right; 0 in an empty bin.
    """

    count: Sequence[int]
    confidence: Sequence[float]
    accuracy: Sequence[float]

    @property
    def error(self) -> float:
        """Expected calibration error: the bins' |accuracy - confidence|, weighted by samples."""
        gaps = np.abs(np.subtract(self.accuracy, self.confidence))
        return float(gaps @ np.asarray(self.count) / max(sum(self.count), 1))


@dataclass
class ReportData:
    """The contents of a report as plain values; empty ones are left out of the page."""

    title: str
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved settings by section."""
    rows: Sequence[dict[str, float]] = ()
    """`MetricsCSV.rows`."""
    final: dict[str, float] = field(default_factory=dict)
    """Final numbers by metric key: test/acc, test/num_samples, ...; accuracies are fractions."""
    class_names: Sequence[str] = ()
    confusion: np.ndarray | None = None
    """[C, C] counts, rows the true class, columns the predicted one."""
    class_acc: Sequence[float] | None = None
    """[C] fractions; from `confusion` where not given."""
    class_support: Sequence[int] | None = None
    """[C] samples counted; from `confusion` where not given."""
    predictions: Sequence[Shown] = ()
    """Fixed images, spread evenly over the split."""
    hardest: Sequence[Shown] = ()
    """The images with the highest loss, highest first."""
    confused: Sequence[Confused] = ()
    """The most confused pairs of classes, with images."""
    calibration: Calibration | None = None
    starts: Sequence[dict[str, Any]] = ()
    """The first start and the restarts of the run (lightship.run.restarts)."""
    environment: dict[str, Any] = field(default_factory=dict)
    """`environment_facts()`."""
    skipped: Sequence[str] = ()
    """Skipped samples, one line each."""

    def __post_init__(self) -> None:
        if self.confusion is not None:
            support = self.confusion.sum(axis=1)
            if self.class_support is None:
                self.class_support = [int(count) for count in support]
            if self.class_acc is None:
                self.class_acc = (np.diagonal(self.confusion) / np.maximum(support, 1)).tolist()


def classes(data: ReportData) -> list[tuple[str, float, int]]:
    """(name, accuracy, samples) of each class that was evaluated."""
    if data.class_acc is None or data.class_support is None:
        return []
    rows = zip(data.class_names, data.class_acc, data.class_support, strict=True)
    return [(name, float(acc), int(support)) for name, acc, support in rows if support]


def confused_pairs(data: ReportData) -> list[tuple[str, str, int]]:
    """(true name, predicted name, count) of the most frequent mistakes."""
    if data.confusion is None:
        return []
    names = data.class_names
    return [(names[t], names[p], n) for t, p, n in most_confused(data.confusion, WORST_PAIRS)]


def most_confused(confusion: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """(true class, predicted class, samples) of up to `count` mistakes, the most frequent first."""
    mistakes = confusion - np.diag(np.diagonal(confusion))
    worst = np.argsort(mistakes, axis=None, kind="stable")[::-1][:count]
    pairs = [divmod(int(flat), len(mistakes)) for flat in worst]
    return [
        (true, guess, int(mistakes[true, guess])) for true, guess in pairs if mistakes[true, guess]
    ]


def _points(rows: Iterable[dict[str, float]], key: str) -> list[Point]:
    """The finite values, thinned evenly to as many as a chart can show."""
    points = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    if len(points) <= _CURVE_POINTS:
        return points
    kept = np.linspace(0, len(points) - 1, _CURVE_POINTS).astype(int)
    return [points[index] for index in kept]


def curves(data: ReportData) -> list[tuple[str, str, dict[str, list[Point]]]]:
    """(title, number format, points by line name) of each chart that has points."""
    charts = []
    for title, number_format, lines in _CURVES:
        found = {name: points for name, key in lines if (points := _points(data.rows, key))}
        if found:
            charts.append((title, number_format, found))
    return charts


def mistakes_first(data: ReportData) -> list[Shown]:
    """Predictions: wrong ones by falling confidence, then right ones by rising confidence."""

    def rank(shown: Shown) -> tuple[bool, float]:
        is_right = shown.true == shown.guess
        return is_right, shown.probability if is_right else -shown.probability

    return sorted(data.predictions, key=rank)
