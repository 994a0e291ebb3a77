"""What a run's checkpoint is asked for: validate and test; and the model in a checkpoint."""

import json
from collections.abc import Callable

from lightship import ranks, storage
from lightship.checkpoint import CheckpointStore
from lightship.cli import Command
from lightship.exits import ConfigError, DataError
from lightship.model.module import ImageClassifier
from lightship.output import RunOutput
from lightship.trainer import build_data, evaluate, numbers_line, start_progress


def validate(command: Command) -> None:
    """Measure a checkpoint on the validation split."""
    _measure(command, "val")


def test(command: Command) -> None:
    """Measure a checkpoint on the test split."""
    _measure(command, "test")


def _measure(command: Command, split: str) -> None:
    """`validate` and `test`: print a checkpoint's metrics and keep them in the report's folder."""
    config = command.config
    progress = start_progress(config)
    output = RunOutput(config, progress.note)
    model = load_model(command, progress.note)
    config.data.image_size_px = model.hparams["image_size_px"]
    data = build_data(config, progress)
    data.load_manifests(None, need=split)
    if data.class_names != model.class_names:
        raise DataError(
            f"--data.root has the classes {_few(data.class_names)}, the checkpoint "
            f"{_few(model.class_names)}"
        )
    numbers = evaluate(config, data, model, split, progress)
    if not ranks.is_first():
        return
    url = output.at("report", f"{split}.json")
    storage.write_bytes(url, json.dumps(numbers, indent=1).encode())
    progress.note(f"{numbers_line(numbers, split)}; {storage.redact(url)}")


def load_model(command: Command, say: Callable[[str], None]) -> ImageClassifier:
    """The model of `ckpt_path` (best, last or a URL), rebuilt from the checkpoint alone.

    Every rank; blocks. Only best and last need a run.

    Raises:
        ConfigError: There is no such checkpoint.
        CheckpointDamaged: It does not match its record.
    """
    choice, has_run = command.ckpt_path or "best", command.config.run.output is not None
    output = RunOutput(command.config, say) if has_run else None
    store = output.checkpoints() if output else CheckpointStore("", say)
    if output and choice in ("best", "last"):
        commit = ranks.from_rank_0(store.best if choice == "best" else store.newest)
        if commit is None:
            raise ConfigError(f"no good checkpoint under --run.output {storage.redact(output.url)}")
        checkpoint = store.load_checkpoint(store.url_of(commit))
    else:
        checkpoint = store.load_checkpoint(choice)
    if not {"state_dict", "hyper_parameters"} <= set(checkpoint):
        raise ConfigError(f"--ckpt_path {storage.redact(choice)} is no checkpoint of lightship's")
    model = ImageClassifier(**{**checkpoint["hyper_parameters"], "weights": None})
    model.load_state_dict(checkpoint["state_dict"])
    return model


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")
