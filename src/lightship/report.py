"""The run's report: one HTML page that needs nothing else, three pictures, and the numbers."""

import base64
import importlib.metadata
import importlib.resources
import io
import json
import math
import os
import platform
import subprocess
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightship import storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_LABELLED_CLASSES = 30
"""Up to so many classes a confusion matrix has its names and counts written in it."""
MAX_JSON_CLASSES = 100
"""Up to so many classes report.json has the whole confusion matrix; its worst pairs always."""
_PAGE_PREDICTIONS, _PICTURE_PREDICTIONS = 60, 32
_CLASS_ROWS, _WORST_PAIRS, _CURVE_POINTS = 200, 20, 300
_THUMBNAIL_PX = 160
_NOT_IN_NUMBERS = ("final", "rows", "predictions", "class_acc", "class_support")
_CURVES = (
    ("Loss", ".3g", (("train", "train/loss"), ("val", "val/loss"))),
    ("Accuracy", ".4g", (("train", "train/acc"), ("val", "val/acc"))),
    ("Learning rate", ".3g", (("rate", "lr"),)),
    ("Images per second", ",.0f", (("images/s", "throughput/images_per_s"),)),
)
_GREY, _BLUE, _RED = "#8a94a6", "#2563eb", "#d9480f"
_PLOT_LEFT, _PLOT_RIGHT, _PLOT_TOP, _PLOT_BOTTOM = 52, 432, 10, 192


@dataclass
class ReportData:
    """All that a report tells, as plain values; what is empty is left out of it."""

    title: str
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved settings by section."""
    rows: Sequence[dict[str, float]] = ()
    """`MetricsTable.rows`."""
    final: dict[str, float] = field(default_factory=dict)
    """Final numbers by metric key: test/acc, test/num_samples, ...; accuracies are fractions."""
    class_names: Sequence[str] = ()
    confusion: np.ndarray | None = None
    """[C, C] counts, rows the true class, columns the predicted one."""
    class_acc: Sequence[float] | None = None
    """[C] fractions; from `confusion` where not given."""
    class_support: Sequence[int] | None = None
    """[C] samples counted; from `confusion` where not given."""
    predictions: Sequence[tuple[np.ndarray, str, str, float]] = ()
    """(image [H, W, 3] uint8, true name, predicted name, probability)."""
    environment: dict[str, Any] = field(default_factory=dict)
    """`environment_facts()`."""
    skipped: Sequence[str] = ()
    """Samples left out, one line each."""
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.confusion is not None:
            support = self.confusion.sum(axis=1)
            if self.class_support is None:
                self.class_support = [int(count) for count in support]
            if self.class_acc is None:
                self.class_acc = (np.diagonal(self.confusion) / np.maximum(support, 1)).tolist()


def environment_facts() -> dict[str, Any]:
    """Versions, device, processors and git commit of this process, as plain values. Any rank."""
    import torch

    packages = ("lightship", "torch", "torchvision", "lightning")
    facts: dict[str, Any] = {"python": platform.python_version()}
    facts |= {package: importlib.metadata.version(package) for package in packages}
    if torch.cuda.is_available():
        facts |= {
            "device": torch.cuda.get_device_name(),
            "gpu_count": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
        }
    else:
        facts["device"] = _processor_name()
    has_affinity = hasattr(os, "sched_getaffinity")
    facts["cpu_count"] = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    facts["world_size"] = int(os.environ.get("WORLD_SIZE", "1"))
    facts["platform"] = platform.platform()
    facts["git_commit"] = git_commit()
    return facts


def git_commit(timeout_s: float = 5.0) -> str | None:
    """Commit checked out in the working directory; None without git, a repository or an answer."""
    command = ["git", "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor_name() -> str:
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_report(output_url: str, data: ReportData) -> str:
    """Write OUTPUT/report/: report.html, report.json and the pictures there is something to draw.

    report.json holds `final` by its keys, then the run's facts; a number that is none is null.

    Rank 0 calls it; blocks (a second or two, and the uploads).

    Returns:
        URL of report.html.
    """
    with warnings.catch_warnings():
        # A class name in a script that the font lacks is drawn as boxes; the page has it right.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        pictures = {
            "curves.png": _draw_curves(data),
            "confusion.png": _draw_confusion(data),
            "predictions.png": _draw_predictions(data),
        }
    numbers = {
        **data.final,
        **{key: value for key, value in vars(data).items() if key not in _NOT_IN_NUMBERS},
        "confusion": data.confusion if len(data.class_names) <= MAX_JSON_CLASSES else None,
        "confused_pairs": _confused_pairs(data),
        "per_class": [{"name": n, "acc": a, "num_samples": s} for n, a, s in _classes(data)],
    }
    files = {name: picture for name, picture in pictures.items() if picture is not None}
    files["report.json"] = json.dumps(_plain(numbers), indent=1, allow_nan=False).encode()
    files["report.html"] = _page(data, pictures["confusion.png"]).encode()
    for name, content in files.items():
        storage.write_bytes(storage.join(output_url, "report", name), content)
    return storage.join(output_url, "report", "report.html")


def _plain(value: Any) -> Any:
    """`value` as JSON has it; a number that is none becomes None."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _classes(data: ReportData) -> list[tuple[str, float, int]]:
    """(name, accuracy, samples) of each class that was evaluated."""
    if data.class_acc is None or data.class_support is None:
        return []
    rows = zip(data.class_names, data.class_acc, data.class_support, strict=True)
    return [(name, float(acc), int(support)) for name, acc, support in rows if support]


def _confused_pairs(data: ReportData) -> list[tuple[str, str, int]]:
    """(true name, predicted name, count) of the most frequent mistakes."""
    if data.confusion is None:
        return []
    mistakes = data.confusion - np.diag(np.diagonal(data.confusion))
    worst = np.argsort(mistakes, axis=None, kind="stable")[::-1][:_WORST_PAIRS]
    pairs = [divmod(int(flat), len(mistakes)) for flat in worst]
    names = data.class_names
    return [(names[t], names[p], int(mistakes[t, p])) for t, p in pairs if mistakes[t, p]]


def _points(rows: Iterable[dict[str, float]], key: str) -> list[tuple[float, float]]:
    """(step, value) where there is a finite value, thinned evenly to what a chart can show."""
    points = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    if len(points) <= _CURVE_POINTS:
        return points
    kept = np.linspace(0, len(points) - 1, _CURVE_POINTS).astype(int)
    return [points[index] for index in kept]


def _curves(data: ReportData) -> list[tuple[str, str, dict[str, list[tuple[float, float]]]]]:
    """(title, number format, points by line name) of each chart with something in it."""
    charts = []
    for title, style, lines in _CURVES:
        found = {name: points for name, key in lines if (points := _points(data.rows, key))}
        if found:
            charts.append((title, style, found))
    return charts


# ---- the page


def _page(data: ReportData, confusion_png: bytes | None) -> str:
    import jinja2

    source = importlib.resources.files("lightship").joinpath("report.html.j2").read_text()
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(source)
    drawn_in_page = len(data.class_names) <= MAX_LABELLED_CLASSES
    final = sorted(data.final.items(), key=lambda number: number[0] != "test/acc")
    return template.render(
        data=data,
        final=[(key, _pretty(key, value)) for key, value in final],
        charts=[_chart(*curve) for curve in _curves(data)],
        classes=sorted(_classes(data), key=lambda row: row[1])[:_CLASS_ROWS],
        shares=_row_shares(data.confusion).round(3).tolist()
        if data.confusion is not None and drawn_in_page
        else None,
        confusion_uri=_data_uri(confusion_png) if confusion_png and not drawn_in_page else None,
        pairs=_confused_pairs(data),
        predictions=[
            (_data_uri(_thumbnail(image)), *names_and_probability)
            for image, *names_and_probability in _mistakes_first(data)[:_PAGE_PREDICTIONS]
        ],
    )


def _mistakes_first(data: ReportData) -> list[tuple[np.ndarray, str, str, float]]:
    """Predictions: the wrong ones, surest first, then the right ones, least sure first."""
    return sorted(data.predictions, key=lambda p: (p[1] == p[2], p[3] if p[1] == p[2] else -p[3]))


def _row_shares(confusion: np.ndarray) -> np.ndarray:
    """Each count as a share of its true class."""
    return confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)


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


def _thumbnail(image: np.ndarray) -> bytes:
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


# ---- the pictures: plain Figure objects, which need no display and leave no state behind


def _png(figure: "Figure") -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, facecolor="white", bbox_inches="tight")
    return content.getvalue()


def _short(name: str, limit: int = 18) -> str:
    """A class name fit for a picture: one printable line."""
    text = "".join(letter if letter.isprintable() else "?" for letter in name)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _draw_curves(data: ReportData) -> bytes | None:
    from matplotlib.figure import Figure

    charts = _curves(data)
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


def _draw_confusion(data: ReportData) -> bytes | None:
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    if data.confusion is None:
        return None
    count = len(data.class_names)
    shares = _row_shares(data.confusion)
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


def _draw_predictions(data: ReportData) -> bytes | None:
    from matplotlib.figure import Figure

    shown = _mistakes_first(data)[:_PICTURE_PREDICTIONS]
    if not shown:
        return None
    columns = min(8, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(1.5 * columns, 1.85 * rows), layout="constrained")
    for index, (image, true, guess, probability) in enumerate(shown):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(image, interpolation="nearest")
        axes.set_axis_off()
        right = f"{_short(guess, 14)} {probability:.2f}"
        text = right if true == guess else f"{right}\nnot {_short(true, 14)}"
        colour = "#333" if true == guess else _RED
        axes.set_title(text, fontsize=8, color=colour, parse_math=False)
    return _png(figure)
