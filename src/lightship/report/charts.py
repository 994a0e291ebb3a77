"""Geometry of the page's SVG charts, in the units of their view box: 440 x 216."""

import math
from typing import Any

from lightship.report.data import Calibration, Point

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 432, 10, 192


def line_chart(title: str, number_format: str, lines: dict[str, list[Point]]) -> dict[str, Any]:
    """Ticks and polylines of one chart, from each line's (step, value) points; at least one."""
    xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
    # A single line starts at 0, so that the noise of a rate is seen against its size.
    y_ticks = ticks(0.0 if len(lines) == 1 else min(ys), max(ys), max_intervals=4)
    low, high, width = y_ticks[0], y_ticks[-1], max(*xs, 1)

    def place(x: float, y: float) -> tuple[float, float]:
        right = _LEFT + (_RIGHT - _LEFT) * x / width
        down = _BOTTOM - (_BOTTOM - _TOP) * (y - low) / (high - low)
        return round(right, 1), round(down, 1)

    return {
        "title": title,
        "x_ticks": [
            (place(tick, low)[0], _with_suffix(tick))
            for tick in ticks(0, width, max_intervals=5, whole=True)
            if tick <= width
        ],
        "y_ticks": [(place(0, tick)[1], format(tick, number_format)) for tick in y_ticks],
        "lines": [
            {
                "name": name,
                "kind": "train" if name == "train" else "main",
                "path": " ".join(f"{x},{y}" for x, y in (place(*point) for point in points)),
                "end": place(*points[-1]),
                "last": format(points[-1][1], number_format),
            }
            for name, points in lines.items()
        ],
    }


def ticks(low: float, high: float, max_intervals: int, whole: bool = False) -> list[float]:
    """At least two round numbers, evenly spaced, that enclose low..high.

    Args:
        low: Smallest value.
        high: Largest value, finite.
        max_intervals: Between low and high; enclosing them may take one more.
        whole: Whole numbers only.
    """
    size = max(abs(low), abs(high))
    span = high - low if high - low > 1e-9 * size else size or 1.0
    power = 10.0 ** math.floor(math.log10(span / max_intervals))
    steps = [factor * power for factor in (1, 2, 2.5, 5, 10)]
    step = next(s for s in steps if s * max_intervals > span * (1 - 1e-9) and not (whole and s % 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def calibration_bars(calibration: Calibration) -> list[dict[str, float]]:
    """The bars of the bins with samples, left to right; the more samples, the more opaque."""
    width = (_RIGHT - _LEFT) / len(calibration.count)
    height = _BOTTOM - _TOP
    max_count = max(calibration.count)
    return [
        {
            "x": round(_LEFT + width * index + 1, 1),
            "width": round(width - 2, 1),
            "y": round(_BOTTOM - height * accuracy, 1),
            "height": round(height * accuracy, 1),
            "opacity": round(0.25 + 0.75 * math.sqrt(count / max_count), 2),
            "count": count,
            "accuracy": accuracy,
            "confidence": confidence,
        }
        for index, (count, confidence, accuracy) in enumerate(
            zip(calibration.count, calibration.confidence, calibration.accuracy, strict=True)
        )
        if count
    ]


def _with_suffix(number: float) -> str:
    """1500 as 1.5k."""
    sizes = (("G", 1e9), ("M", 1e6), ("k", 1e3))
    suffix, size = next((each for each in sizes if number >= each[1]), ("", 1.0))
    return f"{number / size:g}{suffix}"
