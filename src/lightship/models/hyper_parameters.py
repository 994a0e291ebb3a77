"""The hyper-parameters of a checkpoint, written by any version of lightship."""

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightship import __version__, versions
from lightship.config import MAX_IMAGE_SIZE_PX, Interpolation, LossName, OptimConfig
from lightship.data.names import check_class_names
from lightship.errors import ConfigError
from lightship.models.nets.build import is_import_path, skeleton


def complete(model_class: type, kept: Any) -> dict[str, Any]:
    """All arguments of `model_class`.

    Args:
        model_class: ImageClassifier.
        kept: A checkpoint's `hyper_parameters`.

    Returns:
        Those of the checkpoint. What an older version did not write gets the value it implied.

    Raises:
        ConfigError: An unknown hyper-parameter, or a missing one that every version writes.
    """
    arguments = dict(inspect.signature(model_class).parameters)
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
    hints = typing.get_type_hints(model_class.__init__)  # type: ignore[misc]
    for name, value in found.items():
        if not _is_a(value, hints[name]):
            raise ConfigError(f"the checkpoint's hyper-parameter {name} is {value!r:.80}")
    for name, is_right in _BOUNDS.items():
        if not is_right(found[name]):
            raise ConfigError(f"the checkpoint's hyper-parameter {name} is {found[name]!r:.80}")
    weights = found["class_weights"]
    if weights is not None and len(weights) != len(found["class_names"]):
        raise ConfigError(
            f"the checkpoint has {len(weights)} class_weights for {len(found['class_names'])} "
            "classes"
        )
    # 0.1.0 stored names as the file system has them; now they are normalized.
    names = check_class_names(found["class_names"], "the checkpoint")
    return {**found, "class_names": names, "optim": {**optim, **kept["optim"]}}


def from_checkpoint(
    model_class: type, checkpoint: Mapping[str, Any], named_net: str, trust: bool
) -> dict[str, Any]:
    """All arguments of `model_class` in a checkpoint from anywhere. Calls no code that it names.

    Args:
        model_class: ImageClassifier.
        checkpoint: With `hyper_parameters` and `state_dict`.
        named_net: The net that the user named.
        trust: Whether any function may be called that the checkpoint names as its net.

    Raises:
        ConfigError: See `complete`; or the net is code that the user did not name, or the weights
            are not of the net.
    """
    arguments = complete(model_class, checkpoint["hyper_parameters"])
    net, num_classes = arguments["net"], len(arguments["class_names"])
    state = checkpoint["state_dict"]
    if not isinstance(state, Mapping):
        raise ConfigError("the checkpoint's weights are not names and tensors")
    if is_import_path(net):
        if net != named_net and not trust:
            other = f", and --model.net is {named_net}" if is_import_path(named_net) else ""
            raise ConfigError(
                f"the checkpoint's net is the code {net}{other}: to run it, add --model.net {net}"
                " or --model.trust true"
            )
        return arguments
    # A few bytes can ask for a net of any size: what it allocates must be in the checkpoint.
    weights = {name: value for name, value in state.items() if str(name).startswith("net.")}
    if not any(num_classes in getattr(value, "shape", ()) for value in weights.values()):
        raise ConfigError(f"the checkpoint has {num_classes} class names, and no weights for them")
    own = skeleton(net, num_classes, arguments["image_size_px"])
    check_fits({f"net.{name}": value for name, value in own.items()} if own else weights, weights)
    return arguments


def check_fits(own: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Raise ConfigError, with the first difference, if weights do not fit a model's state dict."""
    for name in [*own, *state]:
        if name not in state:
            difference = f"it lacks {name}"
        elif name not in own:
            difference = f"it has {name}, the net does not"
        elif not isinstance(state[name], Tensor) or state[name].is_complex():
            difference = f"{name} holds no real numbers"
        elif state[name].shape != own[name].shape:
            shape = list(state[name].shape)
            difference = f"{name} is {shape}, the net's is {list(own[name].shape)}"
        else:
            continue
        raise ConfigError(
            f"the checkpoint's weights are not those of the net ({difference}): its code has "
            "changed since the checkpoint was written, or --model.net names another"
        )


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a type as ImageClassifier's arguments have it."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(_is_a(value, each) for each in inner)
    if kind is list:
        return isinstance(value, list) and all(_is_a(item, inner[0]) for item in value)
    if kind is dict:
        return isinstance(value, dict) and all(_is_a(key, inner[0]) for key in value)
    if hint is Any:
        return True
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


_BOUNDS: dict[str, Callable[[Any], bool]] = {
    "net": lambda name: name.isprintable() and len(name) <= 200,
    "class_names": lambda names: len(names) > 0,
    "image_size_px": lambda size: 1 <= size <= MAX_IMAGE_SIZE_PX,
    "mean": lambda mean: len(mean) == 3,
    "std": lambda std: len(std) == 3,
    "interpolation": lambda name: name in typing.get_args(Interpolation),
    "eval_crop": lambda crop: 0.1 <= crop <= 1,
    "dropout": lambda share: share is None or 0 <= share < 1,
    "drop_path": lambda share: share is None or 0 <= share < 1,
    "loss": lambda name: name in typing.get_args(LossName),
    "focal_gamma": lambda gamma: 0 <= gamma <= 10,
    "class_weights": lambda weights: weights is None or min(weights, default=-1) >= 0,
}
_OPTIM_FIELDS = dataclasses.fields(OptimConfig)
