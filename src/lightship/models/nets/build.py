"""Nets by name: ours, torchvision's classifiers and the user's own, with or without weights."""

import difflib
import importlib
import os
import re
import sys
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from lightship.checkpoint.serialization import from_bytes
from lightship.errors import ConfigError
from lightship.models.nets.litcnn import litcnn
from lightship.models.nets.speednet import speednet, speednet96
from lightship.storage import read_bytes, redact

_OWN = {"litcnn": litcnn, "speednet": speednet, "speednet96": speednet96}
_AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")
"""Of googlenet and inception_v3: in their published weights, but not built here."""


def build_net(
    name: str, num_classes: int, image_size_px: int, weights: str | None = None
) -> nn.Module:
    """Build a net and check its output on a dummy batch. Every rank; blocks while reading weights.

    Args:
        name: `litcnn`, `speednet`, `speednet96`, a classifier of torchvision.models, or
            `package.module:function`, which is called with the number of classes.
        num_classes: Width of the output.
        image_size_px: Side of the square images.
        weights: None (random), `default` (torchvision's pretrained) or the URL of a state dict or
            checkpoint. The last layer is reinitialized if its number of classes differs.

    Returns:
        A net in training mode, from float [B, 3, S, S] to logits [B, num_classes].

    Raises:
        ConfigError: Unknown name, wrong output, unsupported image size, or weights of another net.
    """
    if ":" in name:
        net = _build_own(name, num_classes)
    elif name in _OWN:
        net = _OWN[name](num_classes, image_size_px)
    else:
        net = _build_torchvision(name, num_classes, image_size_px)
    _check_output(net, name, num_classes, image_size_px)
    if weights is not None:
        _load_weights(net, name, weights)
    return net


def check_training(net: nn.Module, name: str, batch_size: int, image_size_px: int) -> None:
    """Check on a dummy batch that a net can be trained. Does not change the net.

    Args:
        net: From build_net, on the CPU.
        name: Its name, for errors.
        batch_size: Images per device and step in training; more than 2 are tried as 2.
        image_size_px: Side of the square images.

    Raises:
        ConfigError: It fails with this batch size or image size.
    """
    buffers = [
        (part, key, value, value.clone())
        for part in net.modules()
        for key, value in part._buffers.items()
        if value is not None
    ]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            output = net.train()(torch.zeros((min(batch_size, 2), 3, image_size_px, image_size_px)))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        if "more than 1 value per channel" in str(error):
            raise ConfigError(
                f"--model.net {name} cannot train on one image at a time: a BatchNorm layer would "
                "normalise single values. --data.global_batch_size / devices / "
                "--trainer.accumulate_grad_batches must be at least 2 images"
            ) from error
        raise _unsuitable_size(name, image_size_px, error) from error
    finally:
        for part, key, value, was in buffers:
            part._buffers[key] = value
            value.copy_(was)
    if not isinstance(output, Tensor):
        raise ConfigError(
            f"--model.net {name} gives a {type(output).__name__} in training; it must give logits "
            "as in evaluation"
        )


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _build_torchvision(name: str, num_classes: int, image_size_px: int) -> nn.Module:
    names = _torchvision_names()
    if name not in names:
        close = difflib.get_close_matches(name, [*_OWN, *names], n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "e.g. litcnn, resnet18, vit_b_16"
        raise ConfigError(
            f"--model.net '{name}' is no known net ({hint}); your own: package.module:function"
        )
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Their published weights expect another normalization, which the net then does itself.
        # Also without weights, so that a checkpoint rebuilds the same function.
        options = {"aux_logits": False, "transform_input": True, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": image_size_px}
    elif name.startswith("maxvit"):
        options = {"input_size": (image_size_px, image_size_px)}
    try:
        return torchvision.models.get_model(name, num_classes=num_classes, **options)
    except (ValueError, AssertionError) as error:
        raise _unsuitable_size(name, image_size_px, error) from error


def _build_own(name: str, num_classes: int) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise ConfigError(f"--model.net '{name}': expected package.module:function")
    if os.getcwd() not in sys.path:
        # A console script, unlike `python -m`, does not have the working directory on sys.path.
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists; something that it imports does not
        raise ConfigError(
            f"--model.net {name}: no module '{error.name}' here or on PYTHONPATH"
        ) from error
    build = getattr(module, function_name, None)
    if not callable(build):
        close = difflib.get_close_matches(function_name, dir(module), n=3)
        raise ConfigError(
            f"--model.net {name}: {module_name} has no function '{function_name}'"
            + (f"; did you mean {' or '.join(close)}?" if close else "")
        )
    net = build(num_classes)
    if not isinstance(net, nn.Module):
        raise ConfigError(
            f"--model.net {name}: {function_name}({num_classes}) returned a "
            f"{type(net).__name__}; it must return a torch.nn.Module"
        )
    return net


def _check_output(net: nn.Module, name: str, num_classes: int, image_size_px: int) -> None:
    shape = (2, 3, image_size_px, image_size_px)
    # Forked, so that a net that draws random numbers does not change the run's.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        net.eval()
        try:
            output = net(torch.zeros(shape))
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise _unsuitable_size(name, image_size_px, error) from error
        finally:
            net.train()
    came = list(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
    if came != [2, num_classes]:
        raise ConfigError(
            f"--model.net {name}: two images of {image_size_px} px gave {came}; it must give "
            f"logits of shape [2, {num_classes}]"
        )
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ConfigError(f"--model.net {name} has no parameters that can be trained")


def _unsuitable_size(name: str, image_size_px: int, error: Exception) -> ConfigError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ConfigError(
        f"--model.net {name} fails on images of {image_size_px} px ({reason}); "
        "set --data.image_size_px (most published nets take 224) or another net"
    )


def _load_weights(net: nn.Module, name: str, weights: str) -> None:
    url = _default_weights_url(name) if weights == "default" else weights
    where = f"--model.weights {redact(url)}"
    stored = from_bytes(read_bytes(url), where)
    if isinstance(stored.get("state_dict"), dict):
        # A Lightning checkpoint: the net's weights start with `net.`.
        stored = {key.removeprefix("net."): value for key, value in stored["state_dict"].items()}
    if not all(isinstance(value, Tensor) for value in stored.values()):
        raise ConfigError(f"{where} holds no state dict (names to tensors)")
    own = net.state_dict()
    layers = [key for key, part in net.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    head = [key for key in own if layers and key in (f"{layers[-1]}.weight", f"{layers[-1]}.bias")]
    left_out = {
        key for key in head if key in stored and stored[key].shape[:1] != own[key].shape[:1]
    }
    state = {
        # The oldest published DenseNets spell norm1 as norm.1 (see torchvision's densenet.py).
        re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key): value
        for key, value in stored.items()
        if key not in left_out and (key in own or not key.startswith(_AUXILIARY_HEADS))
    }
    try:
        # Not strict, since a net may rename keys of older versions while loading; all are checked.
        keys = net.load_state_dict(state, strict=False)
        problems = [f"{key} is missing" for key in keys.missing_keys if key not in left_out]
        problems += [f"{key} is not of this net" for key in keys.unexpected_keys]
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:]]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ConfigError(
            f"{where} does not fit --model.net {name}: {'; '.join(problems[:3])}{more}"
        )


def _default_weights_url(name: str) -> str:
    if name not in _torchvision_names():
        raise ConfigError(
            f"--model.weights default: {name} has no published weights; give a URL or leave it out"
        )
    return torchvision.models.get_model_weights(name).DEFAULT.url
