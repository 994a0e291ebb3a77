"""`lightship validate` and `test`: a checkpoint's metrics on a split."""

import logging

from lightship import storage, strict_json
from lightship.commands.base import Command
from lightship.commands.loading import load_model
from lightship.data.names import normal_form
from lightship.data.splits import load_splits
from lightship.distributed import comm
from lightship.errors import DataError
from lightship.models.preprocessing import adopt_of_model
from lightship.run.folder import RunFolder
from lightship.training.trainer import build_data, evaluate, numbers_line, start_progress

logger = logging.getLogger(__name__)


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
    data = build_data(config, load_splits(config.data, cache_url, need=split))
    if data.class_names != [normal_form(name) for name in model.class_names]:
        raise DataError(
            f"--data.root has the classes {_few(data.class_names)}, the checkpoint "
            f"{_few(model.class_names)}"
        )
    numbers = evaluate(config, data, model, split, progress)
    url = output.at("report", f"{split}.json")
    content = strict_json.dumps(numbers).encode()
    comm.on_rank_0(lambda: storage.write_bytes(url, content))
    logger.info(f"{numbers_line(numbers, split)}; {storage.redact(url)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")
