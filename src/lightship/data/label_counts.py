"""How many samples each class has, in memory of the classes and a piece of the labels."""

import numpy as np

from lightship.data.columns import Pieces


def count_labels(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Samples of each class, [1 + num_classes] int64: the first of those without a label.

    Args:
        labels: [N] of any integer type, -1 for unlabelled.
        num_classes: More than the largest label.
    """
    counts = np.zeros(1 + num_classes, dtype=np.int64)
    for piece in Pieces(labels):
        counts += _count(piece, len(counts))
    return counts


def _count(piece: np.ndarray, length: int) -> np.ndarray:
    shifted = piece.astype(np.int64)
    shifted += 1
    return np.bincount(shifted, minlength=length)
