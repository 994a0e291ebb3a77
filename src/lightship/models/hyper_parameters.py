"""The hyper-parameters of a checkpoint, written by any version of lightship."""

import dataclasses
import inspect
import unicodedata
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightship import __version__, versions
from lightship.config import OptimConfig
from lightship.errors import ConfigError


def complete(model_class: type, kept: Any) -> dict[str, Any]:
    """All arguments of `model_class` except `weights`, which the checkpoint contains.

    Args:
        model_class: ImageClassifier.
        kept: A checkpoint's `hyper_parameters`.

    Returns:
        Those of the checkpoint. What an older version did not write gets the value it implied.

    Raises:
        ConfigError: An unknown hyper-parameter, or a missing one that every version writes.
    """
    arguments = dict(inspect.signature(model_class).parameters)
    arguments.pop("weights")
    optim = {item.name: versions.meant(f"optim.{item.name}") for item in _OPTIM_FIELDS}
    if not isinstance(kept, Mapping) or not isinstance(kept.get("optim") or {}, Mapping):
        raise ConfigError("the checkpoint's hyper-parameters are not those of a lightship model")
    kept = {**kept, "optim": kept.get("optim") or {}}
    unknown = [name for name in kept if name not in {*arguments, "weights"}]
    unknown += [f"optim.{name}" for name in kept["optim"] if name not in optim]
    if unknown:
        raise ConfigError(
            f"the checkpoint has the hyper-parameter {unknown[0]}, which lightship {__version__} "
            "does not know: upgrade lightship if a newer version wrote it"
        )
    defaults = {
        name: versions.MEANT.get(f"model.{name}", argument.default)
        for name, argument in arguments.items()
        if argument.default is not inspect.Parameter.empty
    }
    missing = [name for name in arguments if name not in {*kept, *defaults}]
    if missing:
        raise ConfigError(f"the checkpoint's hyper-parameters lack {missing[0]}")
    found = {name: kept.get(name, defaults.get(name)) for name in arguments}
    # 0.1.0 stored names as the file system has them; now they are normalized.
    names = [unicodedata.normalize("NFC", name) for name in found["class_names"]]
    return {**found, "class_names": names, "optim": {**optim, **kept["optim"]}}


def check_fits(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise ConfigError, with the first difference, if the weights do not fit the model."""
    own = model.state_dict()
    for name in [*own, *state]:
        if name not in state:
            difference = f"it lacks {name}"
        elif name not in own:
            difference = f"it has {name}, the net does not"
        elif getattr(state[name], "shape", None) != own[name].shape:
            shape = list(getattr(state[name], "shape", []))
            difference = f"{name} is {shape}, the net's is {list(own[name].shape)}"
        else:
            continue
        raise ConfigError(
            f"the checkpoint's weights are not those of the net ({difference}): its code has "
            "changed since the checkpoint was written, or --model.net names another"
        )


_OPTIM_FIELDS = dataclasses.fields(OptimConfig)
