"""The run's report: one HTML page that needs nothing else, three pictures, and the numbers."""

import warnings
from typing import Any

from lightship import storage, strict_json
from lightship.report.data import (
    Calibration,
    Confused,
    ReportData,
    Shown,
    classes,
    confused_pairs,
    most_confused,
)
from lightship.report.html import build_page
from lightship.report.pictures import draw_confusion, draw_curves, draw_predictions

__all__ = ["Calibration", "Confused", "ReportData", "Shown", "most_confused", "write_report"]

MAX_JSON_CLASSES = 100
"""Up to so many classes report.json has the whole confusion matrix; its worst pairs always."""
_NOT_IN_NUMBERS = ("final", "rows", "predictions", "confused", "class_acc", "class_support")


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
            "curves.png": draw_curves(data),
            "confusion.png": draw_confusion(data),
            "predictions.png": draw_predictions(data),
        }
    numbers = {
        **data.final,
        **{key: value for key, value in vars(data).items() if key not in _NOT_IN_NUMBERS},
        "hardest": [_without_image(shown) for shown in data.hardest],
        "calibration": data.calibration
        and {**vars(data.calibration), "error": data.calibration.error},
        "confusion": data.confusion if len(data.class_names) <= MAX_JSON_CLASSES else None,
        "confused_pairs": confused_pairs(data),
        "per_class": [{"name": n, "acc": a, "num_samples": s} for n, a, s in classes(data)],
    }
    files = {name: picture for name, picture in pictures.items() if picture is not None}
    files["report.json"] = strict_json.dumps(numbers).encode()
    files["report.html"] = build_page(data, pictures["confusion.png"]).encode()
    for name, content in files.items():
        storage.write_bytes(storage.join(output_url, "report", name), content)
    return storage.join(output_url, "report", "report.html")


def _without_image(shown: Shown) -> dict[str, Any]:
    return {key: value for key, value in vars(shown).items() if key != "image"}
