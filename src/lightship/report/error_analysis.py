"""What the best checkpoint makes of a split, as the report shows it: mistakes and calibration."""

from typing import Any

import numpy as np

from lightship.data.module import ImageData
from lightship.distributed import comm
from lightship.models.classifier import ImageClassifier
from lightship.report import Calibration, Confused, Shown, most_confused

_HARDEST = 24
_PAIRS, _EXAMPLES_OF_PAIR = 6, 6
_BINS = 15

Row = tuple[float, int, int, int, float]
"""Loss, id, label, guess, probability."""


def find_mistakes(model: ImageClassifier, data: ImageData, split: str) -> dict[str, Any]:
    """The fields of ReportData that come from every image of the evaluation just done.

    Every rank; blocks for the others, and on rank 0 for the images shown. Ranks send what may be
    shown and sums, never all their rows.

    Returns:
        confusion, class_acc, class_support, calibration, hardest and confused; on ranks other than
        0 nothing.
    """
    rows = model.outcomes.take()
    measured = model.eval_metrics
    confusion = measured.get("confusion")
    pairs = most_confused(confusion.numpy(), _PAIRS) if confusion is not None else []
    hardest = np.argsort(-rows["loss"], kind="stable")[:_HARDEST]
    of_pairs = [_surest(rows, true, guess) for true, guess, _ in pairs]
    found = comm.gather_to_rank_0(
        (_bins(rows), _rows(rows, hardest), [_rows(rows, chosen) for chosen in of_pairs])
    )
    if not comm.is_rank_0():
        return {}
    bins, hard, examples = zip(*found, strict=True)
    # Ranks hold other images at another world size; ids break ties, so the page stays the same.
    worst = sorted((row for each in hard for row in each), key=lambda row: (-row[0], row[1]))
    chosen_rows = [worst[:_HARDEST]]
    for index in range(len(pairs)):
        together = [row for each in examples for row in each[index]]
        chosen_rows.append(sorted(together, key=lambda row: (-row[4], row[1]))[:_EXAMPLES_OF_PAIR])
    shown = _shown(model, data, split, chosen_rows)
    names = model.class_names
    return {
        "confusion": None if confusion is None else confusion.numpy(),
        "class_acc": measured["per_class_acc"].tolist(),
        "class_support": measured["support"].tolist(),
        "calibration": _calibration(np.sum(bins, axis=0)),
        "hardest": shown[0],
        "confused": [
            Confused(names[true], names[guess], count, seen)
            for (true, guess, count), seen in zip(pairs, shown[1:], strict=True)
        ],
    }


def _surest(rows: dict[str, np.ndarray], true: int, guess: int) -> np.ndarray:
    """Indices of the rows of one mistake, the surest first."""
    [found] = np.nonzero((rows["label"] == true) & (rows["guess"] == guess))
    return found[np.argsort(-rows["probability"][found], kind="stable")][:_EXAMPLES_OF_PAIR]


def _rows(rows: dict[str, np.ndarray], chosen: np.ndarray) -> list[Row]:
    columns = ("loss", "id", "label", "guess", "probability")
    return list(zip(*(rows[name][chosen].tolist() for name in columns), strict=True))


def _bins(rows: dict[str, np.ndarray]) -> np.ndarray:
    """Samples, sum of top probabilities and hits by bin of the top probability: [3, bins]."""
    probability = rows["probability"].astype(np.float64)
    place = np.minimum((probability * _BINS).astype(np.int64), _BINS - 1)
    weights = (np.ones_like(probability), probability, rows["label"] == rows["guess"])
    return np.stack([np.bincount(place, weight, minlength=_BINS) for weight in weights])


def _calibration(bins: np.ndarray) -> Calibration | None:
    count, confidence, hits = bins
    if not count.any():
        return None
    some = np.maximum(count, 1)
    return Calibration(
        count.astype(int).tolist(), (confidence / some).tolist(), (hits / some).tolist()
    )


def _shown(
    model: ImageClassifier, data: ImageData, split: str, groups: list[list[Row]]
) -> list[list[Shown]]:
    """The images of each group of rows. An image that cannot be read again is left out."""
    ids = sorted({row[1] for rows in groups for row in rows})
    images = data.images(split, np.array(ids, dtype=np.int64))
    names, manifest = model.class_names, data.manifests[split]
    return [
        [
            Shown(images[id], names[label], names[guess], probability, loss, manifest.name(id))
            for loss, id, label, guess, probability in rows
            if id in images
        ]
        for rows in groups
    ]
