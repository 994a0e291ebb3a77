"""Preprocessing that belongs to weights: the pixels that a net was trained on."""

import typing
from collections.abc import Mapping
from typing import Any

import torchvision

from lightship.config import PREPROCESSING, Config, DataConfig, Interpolation, check_resized
from lightship.models.classifier import ImageClassifier
from lightship.models.hyper_parameters import complete
from lightship.models.nets import timm_nets
from lightship.models.nets.published import torchvision_names
from lightship.models.nets.weights import Weights

OF_A_MODEL = ("image_size_px", "interpolation", "eval_crop")
"""Those that a model does not apply itself."""


def of_weights(net: str, weights: Weights) -> dict[str, Any]:
    """PREPROCESSING (and crop_mode) -> the weights' own preprocessing; empty where that is unknown.

    Of a checkpoint of lightship, of timm's configuration of `net`, or of torchvision's transforms.
    """
    if weights.hyper_parameters:
        kept = complete(ImageClassifier, weights.hyper_parameters)
        return {name: kept[name] for name in PREPROCESSING}
    return of_net(net)


def of_net(net: str) -> dict[str, Any]:
    """The same of a net's published weights, by its name alone."""
    if net.startswith(timm_nets.PREFIX):
        return _of_timm(net)
    if net in torchvision_names():
        used = torchvision.models.get_model_weights(net).DEFAULT.transforms()
        (size_px,), (short_px,) = used.crop_size, used.resize_size
        how = used.interpolation.value, size_px / short_px
        return dict(
            zip(PREPROCESSING, (size_px, *how, list(used.mean), list(used.std)), strict=True)
        )
    return {}


def _of_timm(net: str) -> dict[str, Any]:
    config = timm_nets.pretrained_config(net)
    if config is None or config.input_size[1] != config.input_size[2]:
        return {}
    known = config.interpolation in typing.get_args(Interpolation)
    how = config.interpolation if known else "bicubic", config.crop_pct
    values = (config.input_size[1], *how, list(config.mean), list(config.std))
    return {**dict(zip(PREPROCESSING, values, strict=True)), "crop_mode": config.crop_mode}


def adopt(data: DataConfig, own: Mapping[str, Any]) -> str:
    """Set what the settings leave open to the weights' own values.

    Args:
        data: Its fields that are None are set.
        own: Of `of_weights`.

    Returns:
        What differs from the weights' own, as a line; empty if nothing does.

    Raises:
        ConfigError: There is no size, but settings that need one.
    """
    differing = []
    for name, value in own.items():
        if name == "crop_mode":
            differing += [f"crop mode center (theirs: {value})"] if value != "center" else []
        elif name in ("mean", "std") and data.normalize != "auto" and getattr(data, name) is None:
            differing.append(f"normalize {data.normalize} (theirs: {name} {_shown(value)})")
        elif getattr(data, name) is None:
            setattr(data, name, value)
        elif getattr(data, name) != value:
            differing.append(f"{name} {_shown(getattr(data, name))} (theirs: {_shown(value)})")
    check_resized(data)
    if not differing:
        return ""
    return f"preprocessing that differs from the weights' own: {'; '.join(differing)}"


def adopt_by_name(config: Config) -> None:
    """The same without reading the weights, as far as the net's name tells. For `doctor`.

    Raises:
        ConfigError: See `adopt`; or timm is not installed or has no such net.
    """
    if config.model.weights is not None:
        adopt(config.data, of_net(config.model.net))


def adopt_of_model(data: DataConfig, hyper_parameters: Mapping[str, Any]) -> None:
    """Set how a trained model's images are resized. It normalizes them itself."""
    for name in OF_A_MODEL:
        setattr(data, name, hyper_parameters[name])


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(f'{each:.4g}' for each in value)}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
