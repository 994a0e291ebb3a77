"""The checkpoint and the model of a command on a trained run."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from lightship import storage
from lightship.checkpoint.loading import MODEL_KEYS, load_ckpt_path
from lightship.commands.base import Command
from lightship.config import PREPROCESSING
from lightship.data.module import FIXED_STATISTICS
from lightship.distributed import comm
from lightship.errors import ConfigError
from lightship.models.classifier import ImageClassifier
from lightship.models.hyper_parameters import complete
from lightship.models.nets.build import is_import_path
from lightship.run.folder import RunFolder

_OF_EVALUATION = ("test_flip", "test_shift")
"""Hyper-parameters that a command may set otherwise than the fit did."""


def load_model(command: Command) -> ImageClassifier:
    """The model of `ckpt_path`: `load_checkpoint` + `build_model`."""
    return build_model(load_checkpoint(command), command)


def load_checkpoint(command: Command) -> dict[str, Any]:
    """The checkpoint of `ckpt_path` (best, last or a URL; default: best), verified.

    With the test-time augmentation of the command, where that gives it. Every rank; blocks. Only
    best and last need a run.

    Raises:
        ConfigError: There is no such checkpoint, it is damaged, or not one of lightship's; or the
            command gives another net or preprocessing.
    """
    checkpoint = _read(command)
    own = complete(ImageClassifier, checkpoint.get("hyper_parameters"))
    _refuse_others(command, own)
    asked = {
        name: value
        for name in _OF_EVALUATION
        if f"model.{name}" in command.given
        and (value := getattr(command.config.model, name)) != own[name]
    }
    # The rest as it was written: predict's parts are kept for the same hyper-parameters.
    return {**checkpoint, "hyper_parameters": {**checkpoint["hyper_parameters"], **asked}}


def _refuse_others(command: Command, own: Mapping[str, Any]) -> None:
    """Raise ConfigError for a net or preprocessing that the command gives and the model lacks."""
    data, net = command.config.data, command.config.model.net
    asked = {f"data.{name}": (name, getattr(data, name)) for name in PREPROCESSING}
    if not is_import_path(own["net"]):  # else `from_checkpoint` compares them
        asked["model.net"] = "net", net
    for key, (name, value) in asked.items():
        if key in command.given and value not in (None, own[name]):
            raise _other(f"--{key} is {value}", name, own)
    if "data.normalize" in command.given:
        fixed = FIXED_STATISTICS.get(data.normalize, (None, None))
        for name, value in zip(("mean", "std"), fixed, strict=True):
            if f"data.{name}" not in command.given and value not in (None, own[name]):
                raise _other(f"--data.normalize is {data.normalize} ({name} {value})", name, own)


def _other(told: str, name: str, own: Mapping[str, Any]) -> ConfigError:
    return ConfigError(
        f"{told}; the checkpoint's {name} is {own[name]}, which a trained model keeps: leave the "
        "setting out, or train another run with it"
    )


def _read(command: Command) -> dict[str, Any]:
    config, choice = command.config, command.ckpt_path or "best"
    store = RunFolder(config).checkpoints if config.run.output is not None else None
    if store is None or choice not in ("best", "last"):
        where = store.url if store else ""
        return comm.on_every_rank(partial(load_ckpt_path, choice, MODEL_KEYS, where))
    commit = comm.broadcast_from_rank_0(store.best if choice == "best" else store.newest)
    if commit is None:
        where = storage.redact(str(config.run.output))
        raise ConfigError(
            f"--ckpt_path {choice}: no valid checkpoint under --run.output {where}; correct "
            "--run.output, or run lightship fit with it first"
        )
    return comm.on_every_rank(partial(store.load_checkpoint, store.url_of(commit)))


def build_model(checkpoint: dict[str, Any], command: Command) -> ImageClassifier:
    """The model, rebuilt from a checkpoint; see `ImageClassifier.from_checkpoint`."""
    return ImageClassifier.from_checkpoint(
        checkpoint, command.named_net, command.config.model.trust
    )
