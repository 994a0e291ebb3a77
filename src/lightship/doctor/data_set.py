"""What a fit will find at --data.root, where that can be listed in seconds."""

import time
from collections.abc import Mapping
from concurrent.futures import wait

import numpy as np

from lightship import storage
from lightship.config import DataConfig
from lightship.data.images.decode import PixelLimit, decode
from lightship.data.manifest import Manifest, refuse_one_class
from lightship.data.sample_reader import read_samples
from lightship.data.sources.layouts import scan
from lightship.doctor.check import Finding, in_daemon, skipped
from lightship.errors import DataError

_LOOKED_AT_S = 3.0
_MOST_REMOTE, _MOST_LOCAL = 64, 2048
_NAMED_CLASSES = 4
_AT_A_TIME = 32
_CONVERT = "convert them to a format that is read (JPEG, PNG, WebP, BMP, TIFF), or remove them"
_FIX = "mend or remove such files, or set --data.on_error skip"


def examine(data: DataConfig, ends_s: float) -> Finding:
    """List the data set as a fit does, and look at images spread over it. Blocks.

    Args:
        data: The data section.
        ends_s: When to stop, by time.monotonic().

    Raises:
        LightshipError: What ends a fit.
    """
    listing = in_daemon(lambda: scan(data.root, data.root_md5))
    left_s = max(0.0, ends_s - _LOOKED_AT_S - time.monotonic())
    if not wait([listing], left_s).done:
        return skipped(f"not listed within {left_s:.0f} s; a fit lists it once, and keeps the list")
    splits = listing.result()
    told = _told(splits)
    if "train" not in splits:
        found = f"{told}, and no train split"
        return Finding("fail", found, "a fit ends with 65", "name a folder of --data.root train/")
    refuse_one_class(splits["train"], data.root)
    looked_at, bad = _unreadable(data, splits["train"])
    if not bad:
        found = f"{told}; {looked_at:,} of train looked at"
        if splits["train"].not_read:
            return Finding("warn", found, "no reader takes the others", _CONVERT)
        return Finding("ok", found, "can be trained on")
    found = f"{told}; {len(bad)} of {looked_at:,} looked at cannot be read, such as {bad[0]}"
    if data.on_error == "raise":
        return Finding("fail", found, "a fit ends with 65 at the first of them", _FIX)
    if len(bad) > data.max_bad_fraction * looked_at:
        most = f"--data.max_bad_fraction ({data.max_bad_fraction:g})"
        fix = f"mend or remove such files, or raise {most}"
        return Finding("fail", found, f"more than {most}: a fit ends with 65", fix)
    means = "a fit leaves them out and counts them"
    return Finding("warn", found, means, "mend or remove such files")


def _told(splits: Mapping[str, Manifest]) -> str:
    sizes = ", ".join(f"{len(manifest):,} {split}" for split, manifest in splits.items())
    names = next(iter(splits.values())).class_names
    more = ", ..." if len(names) > _NAMED_CLASSES else ""
    left = next(iter(splits.values())).not_read
    classes = f"{len(names)} classes ({', '.join(names[:_NAMED_CLASSES])}{more})"
    return f"{sizes} images in {classes}" + (f"; not read: {left}" if left else "")


def _unreadable(data: DataConfig, manifest: Manifest) -> tuple[int, list[str]]:
    """How many images were looked at, and which of them cannot be read, with why."""
    most = _MOST_REMOTE if storage.is_remote(data.root) else _MOST_LOCAL
    ids = np.unique(np.linspace(0, len(manifest) - 1, most).astype(np.int64))
    rng = np.random.default_rng(0)
    rng.shuffle(ids)  # so that those seen before the time is up lie everywhere
    limit = PixelLimit(data.max_image_pixels)
    ends_s, looked_at, bad = time.monotonic() + _LOOKED_AT_S, 0, []
    for at in range(0, len(ids), _AT_A_TIME):
        for i, sample in read_samples(manifest, np.sort(ids[at : at + _AT_A_TIME])):
            looked_at += 1
            try:
                if isinstance(sample, DataError):
                    raise sample
                decode(sample, manifest.encoding, limit=limit)
            except DataError as error:
                name = manifest.name(i)
                bad.append(str(error) if name in str(error) else f"{name}: {error}")
        if time.monotonic() > ends_s:
            break
    return looked_at, bad
