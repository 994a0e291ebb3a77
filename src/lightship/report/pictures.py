"""The report's pictures as files: curves, confusion matrix, example predictions.

Plain Figure objects, which need no display and leave no state behind.
"""

import io
import math
from typing import TYPE_CHECKING

import numpy as np

from lightship.report.data import (
    MAX_LABELLED_CLASSES,
    ReportData,
    curves,
    mistakes_first,
    row_shares,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PICTURE_PREDICTIONS = 32
_GREY, _BLUE, _RED = "#8a94a6", "#2563eb", "#c2410c"


def _png(figure: "Figure") -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, facecolor="white", bbox_inches="tight")
    return content.getvalue()


def _short(name: str, limit: int = 18) -> str:
    """A class name fit for a picture: one printable line."""
    text = "".join(letter if letter.isprintable() else "?" for letter in name)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def draw_curves(data: ReportData) -> bytes | None:
    """curves.png, if there is a curve."""
    from matplotlib.figure import Figure

    charts = curves(data)
    if not charts:
        return None
    rows = math.ceil(len(charts) / 2)
    figure = Figure(figsize=(10, 3.2 * rows), layout="constrained")
    for index, (title, _, lines) in enumerate(charts):
        axes = figure.add_subplot(rows, min(len(charts), 2), index + 1)
        for name, points in lines.items():
            dots = "o" if len(points) < 40 else None
            colour = _GREY if name == "train" else _BLUE
            axes.plot(*zip(*points, strict=True), color=colour, label=name, marker=dots, ms=3)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("step", fontsize=8, color="#555")
        axes.grid(axis="y", color="#e5e7eb")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=8, length=0)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def draw_confusion(data: ReportData) -> bytes | None:
    """confusion.png, if there is a matrix."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    if data.confusion is None:
        return None
    count = len(data.class_names)
    shares = row_shares(data.confusion)
    size = max(4.5, 0.42 * count) if count <= MAX_LABELLED_CLASSES else 8
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.add_subplot()
    # Square roots: a class taken for another once in a hundred is still seen.
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    axes.set_xlabel("predicted", color="#555")
    axes.set_ylabel("true", color="#555")
    axes.tick_params(labelsize=8, length=0)
    axes.spines[:].set_visible(False)
    if count <= MAX_LABELLED_CLASSES:
        labels = [_short(name) for name in data.class_names]
        axes.set_xticks(range(count), labels, rotation=90, parse_math=False)
        axes.set_yticks(range(count), labels, parse_math=False)
        for (true, guess), number in np.ndenumerate(data.confusion):
            colour = "white" if shares[true, guess] > 0.5 else "#333"
            if number:
                axes.text(guess, true, str(number), ha="center", va="center", size=7, color=colour)
    return _png(figure)


def draw_predictions(data: ReportData) -> bytes | None:
    """predictions.png, if there are examples."""
    from matplotlib.figure import Figure

    shown = mistakes_first(data)[:_PICTURE_PREDICTIONS]
    if not shown:
        return None
    columns = min(8, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(1.5 * columns, 1.85 * rows), layout="constrained")
    for index, one in enumerate(shown):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(one.image, interpolation="nearest")
        axes.set_axis_off()
        right = f"{_short(one.guess, 14)} {one.probability:.2f}"
        is_right = one.true == one.guess
        text = right if is_right else f"{right}\nnot {_short(one.true, 14)}"
        colour = "#333" if is_right else _RED
        axes.set_title(text, fontsize=8, color=colour, parse_math=False)
    return _png(figure)
