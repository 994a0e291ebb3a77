"""`lightship validate` and `test`: a checkpoint's metrics on a split."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from lightship import storage, strict_json
from lightship.commands.base import Command
from lightship.commands.loading import load_model
from lightship.data.batch import NOT_COUNTED
from lightship.data.manifest import Manifest
from lightship.data.names import normal_form
from lightship.data.splits import load_splits
from lightship.distributed import comm
from lightship.errors import ConfigError, DataError
from lightship.models.preprocessing import adopt_of_model
from lightship.run.folder import RunFolder
from lightship.training.trainer import build_data, evaluate, numbers_line, start_progress

logger = logging.getLogger(__name__)
_NAMED = 5


def validate(command: Command) -> None:
    """Evaluate a checkpoint on the validation split."""
    _evaluate(command, "val")


def test(command: Command) -> None:
    """Evaluate a checkpoint on the test split."""
    _evaluate(command, "test")


def _evaluate(command: Command, split: str) -> None:
    """Log a checkpoint's metrics on a split and write them to report/. Every rank; blocks."""
    config = command.config
    progress = start_progress(config)
    output = RunFolder(config)
    model = load_model(command)
    adopt_of_model(config.data, model.hparams)
    # Images added to data.root after the fit would move others between train and validation.
    is_held_out = split == "val" and command.is_on_its_data
    cache_url = output.at("data") if is_held_out else None
    manifest = load_splits(config.data, cache_url, need=split)[split]
    data = build_data(config, {split: _with_classes(manifest, model.class_names, split)})
    numbers = evaluate(config, data, model, split, progress)
    url = output.at("report", f"{split}.json")
    comm.on_rank_0(partial(_write, url, numbers, split))


def _with_classes(manifest: Manifest, class_names: Sequence[str], split: str) -> Manifest:
    """The split with a checkpoint's classes, matched by name: some may have no image in it.

    Raises:
        DataError: Images are of classes that the checkpoint does not know.
    """
    known = {normal_form(name): label for label, name in enumerate(class_names)}
    if manifest.class_names == list(known):
        return manifest
    labels = [known.get(name, NOT_COUNTED) for name in manifest.class_names]
    seen = np.unique(manifest.label).tolist()
    unknown = [manifest.class_names[i] for i in seen if i >= 0 and labels[i] == NOT_COUNTED]
    if unknown:
        rest = f", ... ({len(unknown)})" if len(unknown) > _NAMED else ""
        raise DataError(
            f"--data.root has {split} images of classes that the checkpoint does not know: "
            f"{', '.join(unknown[:_NAMED])}{rest}; it knows {len(known)} classes: remove these "
            "images, or train another run with them"
        )
    return replace(
        manifest,
        class_names=list(class_names),
        label=np.array([*labels, -1])[manifest.label.astype(np.int64)],  # -1 is unlabelled
    )


def _write(url: str, numbers: Mapping[str, float], split: str) -> None:
    """Log the metrics and write them, where the run's folder is not read-only. Rank 0; blocks."""
    line = numbers_line(numbers, split)
    try:
        storage.write_bytes(url, strict_json.dumps(numbers).encode())
    except ConfigError as error:
        logger.info(line)
        logger.warning(f"the metrics are only in this log: {error}")
    else:
        logger.info(f"{line}; {storage.redact(url)}")
