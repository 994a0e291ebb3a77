"""The checkpoint and the model of a command on a trained run."""

from typing import Any

from lightship import storage
from lightship.checkpoint.loading import MODEL_KEYS, load_ckpt_path
from lightship.commands.base import Command
from lightship.distributed import comm
from lightship.errors import ConfigError
from lightship.models.classifier import ImageClassifier
from lightship.run.folder import RunFolder


def load_model(command: Command) -> ImageClassifier:
    """The model of `ckpt_path`: `load_checkpoint` + `build_model`."""
    return build_model(load_checkpoint(command), command)


def load_checkpoint(command: Command) -> dict[str, Any]:
    """The checkpoint of `ckpt_path` (best, last or a URL; default: best), verified.

    Every rank; blocks. Only best and last need a run.

    Raises:
        ConfigError: There is no such checkpoint, it is damaged, or not one of lightship's.
    """
    config, choice = command.config, command.ckpt_path or "best"
    store = RunFolder(config).checkpoints if config.run.output is not None else None
    if store is None or choice not in ("best", "last"):
        return load_ckpt_path(choice, MODEL_KEYS, store.url if store else "")
    commit = comm.broadcast_from_rank_0(store.best if choice == "best" else store.newest)
    if commit is None:
        where = storage.redact(str(config.run.output))
        raise ConfigError(f"--ckpt_path {choice}: no valid checkpoint under --run.output {where}")
    return store.load_checkpoint(store.url_of(commit))


def build_model(checkpoint: dict[str, Any], command: Command) -> ImageClassifier:
    """The model, rebuilt from a checkpoint; see `ImageClassifier.from_checkpoint`."""
    return ImageClassifier.from_checkpoint(
        checkpoint, command.named_net, command.config.model.trust
    )
