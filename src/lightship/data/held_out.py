"""What is held out of train where there is no val: the same samples in every version."""

import numpy as np

from lightship.data.label_counts import count_labels
from lightship.data.manifest import Manifest
from lightship.errors import DataError

_SEED = 20_100_617  # never changes: every run holds out the same images
_AT_ONCE = 2**18


def hold_out(manifest: Manifest, fraction: float) -> np.ndarray:
    """Choose about `fraction` of the samples, [N] bool, the same ones on every call.

    Stratified: each class gives its share (largest remainders first), the first ones of a fixed
    shuffle of all samples, and keeps at least one sample for training. At least one sample is held
    out. Takes 5 bytes a sample of memory.

    Raises:
        DataError: No class has two samples, so none can be held out.
    """
    assert 0 < fraction < 1, fraction
    left = _shares(manifest, fraction)
    count = len(manifest)
    shuffled = np.arange(count, dtype=np.uint32 if count <= 2**32 else np.int64)
    # RandomState, because NumPy promises its stream for ever.
    np.random.RandomState(_SEED).shuffle(shuffled)
    held_out = np.zeros(count, dtype=bool)
    for start in range(0, count, _AT_ONCE):
        ids = shuffled[start : start + _AT_ONCE]
        classes = manifest.label[ids].astype(np.int64) + 1
        by_class = np.argsort(classes, kind="stable")
        classes = classes[by_class]
        rank_in_class = np.arange(len(ids)) - np.searchsorted(classes, classes)
        held_out[ids[by_class[rank_in_class < left[classes]]]] = True
        left = np.maximum(left - np.bincount(classes, minlength=len(left)), 0)
        if not left.any():
            break
    return held_out


def _shares(manifest: Manifest, fraction: float) -> np.ndarray:
    """How many samples each class gives, [1 + classes] int64: the first is of those without one."""
    of_all = count_labels(manifest.label, len(manifest.class_names))
    present = np.flatnonzero(of_all)
    counts = of_all[present]
    room = counts - 1
    if not room.sum():
        raise DataError(
            f"--data.val_fraction {fraction:g}: no class has two images, so none can be held out; "
            "add a val split or set --data.val_fraction 0"
        )
    share = np.minimum(np.floor(counts * fraction).astype(np.int64), room)
    missing = min(max(1, round(len(manifest) * fraction)), int(room.sum())) - int(share.sum())
    by_remainder = np.argsort(share - counts * fraction, kind="stable")
    for c in by_remainder[share[by_remainder] < room[by_remainder]][: max(0, missing)]:
        share[c] += 1
    of_all[present] = share
    return of_all


def split_validation(manifest: Manifest, fraction: float) -> tuple[Manifest, Manifest]:
    """(train, val) as `hold_out` chooses; both keep the order."""
    held_out = hold_out(manifest, fraction)
    return manifest.take(np.flatnonzero(~held_out)), manifest.take(np.flatnonzero(held_out))
