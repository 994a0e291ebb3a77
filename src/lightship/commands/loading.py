"""The model in a checkpoint: what every command on a trained run begins with."""

from typing import Any

from lightship import storage
from lightship.checkpoint.store import CheckpointStore
from lightship.commands.base import Command
from lightship.distributed import comm
from lightship.errors import ConfigError
from lightship.models.classifier import ImageClassifier
from lightship.models.hyper_parameters import check_fits, complete
from lightship.run.folder import RunFolder


def load_model(command: Command) -> ImageClassifier:
    """The model of `ckpt_path`: `load_checkpoint` + `build_model`."""
    return build_model(load_checkpoint(command))


def load_checkpoint(command: Command) -> dict[str, Any]:
    """The checkpoint of `ckpt_path` (best, last or a URL; default: best), verified.

    Every rank; blocks. Only best and last need a run.

    Raises:
        ConfigError: There is no such checkpoint, or it is not one of lightship's.
        CheckpointDamaged: It does not match its record.
    """
    choice, has_run = command.ckpt_path or "best", command.config.run.output is not None
    output = RunFolder(command.config) if has_run else None
    store = output.checkpoints if output else CheckpointStore("")
    if output and choice in ("best", "last"):
        commit = comm.broadcast_from_rank_0(store.best if choice == "best" else store.newest)
        if commit is None:
            raise ConfigError(
                f"no valid checkpoint under --run.output {storage.redact(output.url)}"
            )
        checkpoint = store.load_checkpoint(store.url_of(commit))
    else:
        checkpoint = store.load_checkpoint(choice)
    if not {"state_dict", "hyper_parameters"} <= set(checkpoint):
        raise ConfigError(f"--ckpt_path {storage.redact(choice)} is no checkpoint of lightship's")
    return checkpoint


def build_model(checkpoint: dict[str, Any]) -> ImageClassifier:
    """The model, rebuilt from a checkpoint of lightship's alone.

    Raises:
        ConfigError: Its hyper-parameters or weights do not fit this version, or the net's code.
    """
    arguments = complete(ImageClassifier, checkpoint["hyper_parameters"])
    model = ImageClassifier(**arguments, weights=None)
    check_fits(model, checkpoint["state_dict"])
    model.load_state_dict(checkpoint["state_dict"])
    return model
