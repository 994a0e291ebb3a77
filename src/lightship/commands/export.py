"""`lightship export`: a checkpoint as one file that runs without lightship, checked against it.

docs/export.md describes how to load the file, and how to resize images to the size that it takes.
"""

import logging
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightship import storage
from lightship.commands.base import Command
from lightship.commands.loading import build_model, load_checkpoint
from lightship.config import EXPORTS, Config, DataConfig
from lightship.data.images.limits import ImageLimits
from lightship.data.sample_decoder import decode_all
from lightship.data.splits import load_splits
from lightship.distributed import comm
from lightship.errors import DataError, LightshipError
from lightship.exporters.formats import FORMATS, facts_of
from lightship.exporters.verify import check
from lightship.models.classifier import ImageClassifier
from lightship.training.callbacks.progress import Progress
from lightship.training.trainer import start_progress

logger = logging.getLogger(__name__)
_COMPARED_IMAGES = 64


def export(command: Command) -> None:
    """Write a checkpoint as `command.format` asks, if the file gives the checkpoint's outputs.

    Called in one process; blocks.

    Raises:
        ConfigError: A package is missing, the net cannot be exported, or the file differs.
    """
    config = command.config
    form = FORMATS[command.format]
    url = command.export or storage.join(str(config.run.output), "export", EXPORTS[form.name])
    form.check_asked(url)
    progress = start_progress(config)
    torch.set_float32_matmul_precision("highest")  # which it has just lowered: fp32 is compared
    checkpoint = load_checkpoint(command)
    model = build_model(checkpoint, command).eval()
    form.check_fits(model)
    what = f"{model.hparams['net']} of step {checkpoint['global_step']}"
    logger.info(f"exporting {what} as {form.name}")
    images, called = _images(config, model, progress)
    with tempfile.TemporaryDirectory(prefix="lightship-") as folder:
        path = Path(folder) / EXPORTS[form.name]
        form.write(model, facts_of(model, checkpoint), path)
        difference = check(form, path, model, images)
        size_bytes = path.stat().st_size
        storage.write_file(url, path)
    shown = storage.redact(url)
    logger.info(
        f"exported {what}, {len(model.class_names)} classes, {size_bytes / 1e6:.1f} MB: {shown}; "
        f"within {difference:.1g} of the checkpoint's outputs on {called}; to load it: "
        f"{form.loading.format(storage.base_name(url))}"
    )


def _images(config: Config, model: ImageClassifier, progress: Progress) -> tuple[Tensor, str]:
    """Images to compare on, [K, 3, S, S] uint8, and what they are: the run's, else random ones."""
    if config.run.output is not None or config.data.root != DataConfig.root:
        try:
            return _real_images(config, model)
        except LightshipError as error:
            logger.warning(f"comparing on random images; the run's cannot be read: {error}")
    size_px = model.hparams["image_size_px"]
    shape = (_COMPARED_IMAGES, 3, size_px, size_px)
    generator = torch.Generator().manual_seed(config.run.seed)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return images, f"{len(images)} random images (seed {config.run.seed})"


def _real_images(config: Config, model: ImageClassifier) -> tuple[Tensor, str]:
    output = config.run.output
    cache_url = storage.join(output, "data") if output else None
    splits = load_splits(config.data, cache_url, need="train")
    shown = storage.redact(config.data.root)
    split = next(name for name in ("test", "val", "train") if name in splits)
    manifest = splits[split]
    ids = np.unique(np.linspace(0, len(manifest) - 1, _COMPARED_IMAGES).astype(np.int64))
    images, bad = decode_all(
        manifest,
        ids,
        image_size_px=model.hparams["image_size_px"],
        resize=model.resize,
        threads=comm.cores(),
        limits=ImageLimits.of(config.data),
        max_bad_fraction=1.0,
    )
    good = torch.from_numpy(images[~np.isin(ids, list(bad.reasons))]).permute(0, 3, 1, 2)
    if len(good) < 2:
        raise DataError(f"fewer than two images of {split} can be read at --data.root {shown}")
    return good, f"{len(good)} images of {split} at {shown}"
