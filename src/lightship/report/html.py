"""The report's page: one HTML file that needs nothing else."""

import base64
import importlib.resources
import io
import math
from typing import Any

import numpy as np

from lightship.report.data import (
    MAX_LABELLED_CLASSES,
    Calibration,
    ReportData,
    Shown,
    classes,
    confused_pairs,
    curves,
    mistakes_first,
    row_shares,
)

_PAGE_PREDICTIONS, _CLASS_ROWS = 60, 200
_THUMBNAIL_PX = 160
_PLOT_LEFT, _PLOT_RIGHT, _PLOT_TOP, _PLOT_BOTTOM = 52, 432, 10, 192


def build_page(data: ReportData, confusion_png: bytes | None) -> str:
    """The page as HTML.

    Args:
        data: What to tell.
        confusion_png: The matrix as a picture, for where it has too many classes for a table.
    """
    import jinja2

    source = importlib.resources.files("lightship.report").joinpath("page.html.j2").read_text()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["uri"] = lambda shown: _data_uri(_thumbnail(shown.image))
    drawn_in_page = len(data.class_names) <= MAX_LABELLED_CLASSES
    final = sorted(data.final.items(), key=lambda number: number[0] != "test/acc")
    return environment.from_string(source).render(
        data=data,
        final=[(key, _pretty(key, value)) for key, value in final],
        charts=[_chart(*curve) for curve in curves(data)],
        bars=_bars(data.calibration) if data.calibration else None,
        classes=sorted(classes(data), key=lambda row: row[1])[:_CLASS_ROWS],
        shares=row_shares(data.confusion).round(3).tolist()
        if data.confusion is not None and drawn_in_page
        else None,
        confusion_uri=_data_uri(confusion_png) if confusion_png and not drawn_in_page else None,
        pairs=confused_pairs(data),
        predictions=mistakes_first(data)[:_PAGE_PREDICTIONS],
        is_tiny=_is_tiny([*data.predictions, *data.hardest]),
    )


def _is_tiny(shown: list[Shown]) -> bool:
    """Whether the images have so few pixels that each is to be seen as one."""
    return bool(shown) and shown[0].image.shape[0] <= 96


def _pretty(key: str, value: float) -> str:
    """A final number as a person reads it: fractions as per cent, counts with separators."""
    if not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "not a number"
    if key.rpartition("/")[2] in ("acc", "top5", "best_acc"):
        return f"{value:.2%}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"


def _chart(title: str, style: str, lines: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Geometry of one line chart in the page's SVG units."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
    lowest = 0.0 if len(lines) == 1 else min(ys)  # a rate's noise is seen against its size
    y_ticks = [float(tick) for tick in MaxNLocator(4).tick_values(lowest, max(ys))]
    x_ticks = [float(t) for t in MaxNLocator(5, integer=True).tick_values(0, max(xs))]
    low, high, width = y_ticks[0], y_ticks[-1], max(max(xs), 1)

    def place(x: float, y: float) -> tuple[float, float]:
        right = _PLOT_LEFT + (_PLOT_RIGHT - _PLOT_LEFT) * x / width
        down = _PLOT_BOTTOM - (_PLOT_BOTTOM - _PLOT_TOP) * (y - low) / (high - low)
        return round(right, 1), round(down, 1)

    return {
        "title": title,
        "x_ticks": [
            (place(t, low)[0], EngFormatter(sep="")(t)) for t in x_ticks if 0 <= t <= width
        ],
        "y_ticks": [(place(0, tick)[1], format(tick, style)) for tick in y_ticks],
        "lines": [
            {
                "name": name,
                "kind": "train" if name == "train" else "main",
                "path": " ".join(f"{x},{y}" for x, y in (place(*point) for point in points)),
                "end": place(*points[-1]),
                "last": format(points[-1][1], style),
            }
            for name, points in lines.items()
        ],
    }


def _bars(calibration: Calibration) -> list[dict[str, float]]:
    """Geometry of the calibration's bars in the page's SVG units, left to right."""
    width = (_PLOT_RIGHT - _PLOT_LEFT) / len(calibration.count)
    height = _PLOT_BOTTOM - _PLOT_TOP
    most = max(calibration.count)
    return [
        {
            "x": round(_PLOT_LEFT + width * index + 1, 1),
            "width": round(width - 2, 1),
            "y": round(_PLOT_BOTTOM - height * accuracy, 1),
            "height": round(height * accuracy, 1),
            "opacity": round(0.25 + 0.75 * math.sqrt(count / most), 2),
            "count": count,
            "accuracy": accuracy,
            "confidence": confidence,
        }
        for index, (count, confidence, accuracy) in enumerate(
            zip(calibration.count, calibration.confidence, calibration.accuracy, strict=True)
        )
        if count
    ]


def _thumbnail(image: np.ndarray) -> bytes:
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
