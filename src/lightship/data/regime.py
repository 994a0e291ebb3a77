"""The regime of a split (resident or streaming), and the side of its images."""

from typing import Literal

import numpy as np

from lightship import storage
from lightship.config import DataConfig
from lightship.data.bad_samples import BadSamples
from lightship.data.images.limits import ImageLimits
from lightship.data.images.resize import DEFAULT_RESIZE, Resize
from lightship.data.manifest import Manifest
from lightship.data.sample_decoder import SampleDecoder
from lightship.data.sample_reader import read_samples
from lightship.errors import ConfigError, DataError

_MAX_READ = 64
_FROM_THE_ORIGINAL = ("crop_min_area", "sizes_px")
"""Settings of training whose images are made anew of the original ones."""


def is_streamed(config: DataConfig) -> bool:
    """Whether the settings alone say that training images are streamed."""
    is_remade = any(getattr(config, name) for name in _FROM_THE_ORIGINAL)
    return config.mode == "streaming" or is_remade


def resize_of(config: DataConfig) -> Resize | None:
    """How images become squares; None: they are not resized."""
    if config.image_size_px is None:
        return None
    plain = DEFAULT_RESIZE
    return Resize(config.interpolation or plain.interpolation, config.eval_crop or plain.crop)


def side_of(image: np.ndarray, name: str) -> int:
    """Side in pixels of an image [S, S, 3] that is not resized.

    Raises:
        DataError: It is not square.
    """
    height, width, _ = image.shape
    if height != width:
        raise DataError(
            f"{name} is {width}x{height} px, which is not square: set --data.image_size_px, the "
            "side of the square that each image is scaled and cropped to"
        )
    return int(height)


def side_of_first(manifest: Manifest, bad: BadSamples, limits: ImageLimits) -> int:
    """Side in pixels of the first image of a split that can be read. Any rank; blocks.

    Args:
        manifest: The split.
        bad: Takes those before it.
        limits: What decoding an image may cost.

    Raises:
        DataError: It is not square; or an image cannot be read and may not be skipped.
    """
    decoder = SampleDecoder(manifest, limits=limits)
    start, count = 0, 1
    while start < len(manifest):
        ids = np.arange(start, min(start + count, len(manifest)))
        for i, sample in read_samples(manifest, ids):
            image = decoder.decode(i, sample)
            if not isinstance(image, DataError):
                return side_of(image, manifest.name(i))
            bad.add(i, image)
        start, count = start + count, min(2 * count, _MAX_READ)
    raise DataError(f"none of {len(manifest)} images can be read: {bad.first_reasons()}")


def choose_regime(
    config: DataConfig, split: str, manifest: Manifest, size_px: int
) -> Literal["resident", "streaming"]:
    """How a split is read.

    Args:
        config: The data section.
        split: Its name.
        manifest: The split.
        size_px: Side of its decoded images.

    Raises:
        ConfigError: It must be streamed and cannot, or must be resident and does not fit.
    """
    needs_memory = manifest.container == "gzip" or storage.is_private(manifest.root)
    if split == "predict" and config.mode == "auto" and not needs_memory:
        return "streaming"  # each image is wanted once, and results from the first moment on
    gib = len(manifest) * 3 * size_px * size_px / 2**30
    forced = next((name for name in _FROM_THE_ORIGINAL if getattr(config, name)), None)
    if config.mode == "streaming" or (split == "train" and forced):
        why = f"--data.{forced}" if split == "train" and forced else "--data.mode streaming"
    elif gib <= config.resident_gib:
        return "resident"
    elif config.mode == "resident":
        raise ConfigError(
            f"the {split} split decodes to {gib:.1f} GiB at {size_px} px, more than "
            f"--data.resident_gib {config.resident_gib:g}: raise it, lower "
            "--data.image_size_px or set --data.mode streaming"
        )
    else:
        why = f"{gib:.1f} GiB decoded, more than --data.resident_gib {config.resident_gib:g}"
    if manifest.container == "gzip":
        raise ConfigError(
            f"the {split} split must be streamed ({why}), and gzip cannot be read in part: "
            "pack it first (lightship pack)"
        )
    if storage.is_private(manifest.root):
        raise ConfigError(
            f"the {split} split must be streamed ({why}), and memory:// cannot: it is read by "
            "another process"
        )
    return "streaming"
