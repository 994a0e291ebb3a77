"""The report's page: one HTML file without scripts or links to other files."""

import base64
import io
import math
from typing import Any

import numpy as np
from PIL import Image

from lightship.report.charts import calibration_bars, line_chart
from lightship.report.data import (
    ReportData,
    classes,
    confused_pairs,
    curves,
    mistakes_first,
)
from lightship.safe_text import shown

MAX_TABLE_CLASSES = 30
"""The confusion matrix is a table of counts up to this many classes, a picture beyond."""
_MAX_PREDICTIONS, _MAX_CLASS_ROWS = 60, 200
_THUMBNAIL_PX = 160
_HEADLINES = ("test/acc", "val/acc")
_PNG = "data:image/png;base64,"
_RIGHT_RGB, _WRONG_RGB = (59, 130, 246), (234, 88, 12)  # seen on a white and on a dark card


def build_page(data: ReportData) -> str:
    """The page as HTML."""
    import jinja2  # a run that fails or is stopped needs none

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lightship", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalized,
    )
    environment.filters |= {"uri": _png_uri, "thumbnail": _thumbnail}
    headline = next((key for key in _HEADLINES if key in data.final), None)
    final = sorted(data.final.items(), key=lambda number: number[0] != headline)
    images = [shown.image for shown in (*data.predictions, *data.hardest)]
    shares = None if data.confusion is None else _row_shares(data.confusion)
    is_table = len(data.class_names) <= MAX_TABLE_CLASSES
    return environment.get_template("page.html.j2").render(
        data=data,
        final=[(key, _formatted(key, value)) for key, value in final],
        charts=[line_chart(*curve) for curve in curves(data)],
        bars=calibration_bars(data.calibration) if data.calibration else None,
        classes=sorted(classes(data), key=lambda row: row[1])[:_MAX_CLASS_ROWS],
        shares=shares.round(3).tolist() if shares is not None and is_table else None,
        heat_map=_heat_map(shares) if shares is not None and not is_table else None,
        pairs=confused_pairs(data),
        predictions=mistakes_first(data)[:_MAX_PREDICTIONS],
        is_tiny=bool(images) and images[0].shape[0] <= 96,  # so small that each pixel is shown
    )


def _finalized(value: Any) -> Any:
    """Each value that the page shows: texts without secrets and controls (jinja escapes HTML)."""
    is_picture = isinstance(value, str) and value.startswith(_PNG)
    return shown(value) if type(value) is str and not is_picture else value


def _formatted(key: str, value: float) -> str:
    """A final number: fractions as per cent, counts with separators."""
    if not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "not a number"
    if key.rpartition("/")[2] in ("acc", "balanced_acc", "top5", "best_acc"):
        return f"{value:.2%}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"


def _row_shares(confusion: np.ndarray) -> np.ndarray:
    """Each count as a share of its true class."""
    return confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)


def _heat_map(shares: np.ndarray) -> np.ndarray:
    """A confusion matrix as RGBA pixels, one a cell: [C, C, 4] uint8."""
    pixels = np.empty((*shares.shape, 4), np.uint8)
    pixels[..., :3] = _WRONG_RGB
    np.einsum("iic->ic", pixels)[:, :3] = _RIGHT_RGB
    pixels[..., 3] = 255 * np.sqrt(shares)  # so that a mistake made once in a hundred shows
    return pixels


def _thumbnail(image: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(image)
    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return np.asarray(picture)


def _png_uri(image: np.ndarray) -> str:
    """Pixels, [H, W, 3 or 4] uint8, as the address of a PNG within the page."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG", optimize=True)
    return _PNG + base64.b64encode(content.getvalue()).decode()
