"""The run's report: one self-contained HTML page, and its numbers as JSON."""

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

__all__ = ["Calibration", "Confused", "ReportData", "Shown", "most_confused", "write_report"]

MAX_JSON_CLASSES = 100
"""report.json has the whole confusion matrix up to this many classes; its worst pairs always."""
_NOT_IN_NUMBERS = ("final", "rows", "predictions", "confused", "class_acc", "class_support")


def write_report(output_url: str, data: ReportData) -> str:
    """Write OUTPUT/report/report.html and report.json. Rank 0; blocks for the uploads.

    report.json holds `final` by its keys, then the run's facts; NaN and infinity become null.

    Returns:
        URL of report.html.
    """
    numbers = {
        **data.final,
        **{key: value for key, value in vars(data).items() if key not in _NOT_IN_NUMBERS},
        "hardest": [
            {key: value for key, value in vars(shown).items() if key != "image"}
            for shown in data.hardest
        ],
        "calibration": data.calibration
        and {**vars(data.calibration), "error": data.calibration.error},
        "confusion": data.confusion if len(data.class_names) <= MAX_JSON_CLASSES else None,
        "confused_pairs": confused_pairs(data),
        "per_class": [{"name": n, "acc": a, "num_samples": s} for n, a, s in classes(data)],
    }
    page_url = storage.join(output_url, "report", "report.html")
    json_url = storage.join(output_url, "report", "report.json")
    storage.write_bytes(json_url, strict_json.dumps(numbers).encode())
    storage.write_bytes(page_url, build_page(data).encode())
    return page_url
