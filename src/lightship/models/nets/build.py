"""Nets by name: ours, classifiers of torchvision and timm, and the user's own."""

import contextlib
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from lightship.errors import ConfigError
from lightship.models.nets import timm_nets
from lightship.models.nets.depthwise import in_float32_on_cpu
from lightship.models.nets.dropping import check_dropping, set_dropping, timm_options
from lightship.models.nets.last_layer import note_last_layer, noted_calls
from lightship.models.nets.litcnn import litcnn
from lightship.models.nets.published import torchvision_names
from lightship.models.nets.speednet import speednet, speednet96

logger = logging.getLogger(__name__)
_NO_OPTIONS: Mapping[str, float] = {}
_OWN = {"litcnn": litcnn, "speednet": speednet, "speednet96": speednet96}

_SIZE_FLAG = "--data.image_size_px"


def build_net(
    name: str,
    num_classes: int,
    image_size_px: int,
    dropout: float | None = None,
    drop_path: float | None = None,
) -> nn.Module:
    """Build a net with random weights, and check its output on a dummy batch.

    That batch also shows which is its last layer (see `structure.head_parameters`).

    Args:
        name: `litcnn`, `speednet`, `speednet96`, a classifier of torchvision.models, `timm:NAME`,
            or `package.module:function`, which is called with the number of classes.
        num_classes: Width of the output.
        image_size_px: Side of the square images.
        dropout: Probability of the net's dropout; None: its own.
        drop_path: Probability of stochastic depth, of the last branch; None: the net's own.

    Returns:
        A net in training mode, from float [B, 3, S, S] to logits [B, num_classes].

    Raises:
        ConfigError: Unknown name, wrong output, unsupported image size, or nothing to drop.
    """
    if is_import_path(name):
        net = _build_own(name, num_classes)
    else:
        options = timm_options(dropout, drop_path)
        net = _build_known(name, num_classes, image_size_px, options)
    set_dropping(net, dropout, drop_path)
    check_dropping(net, name, dropout, drop_path)
    in_float32_on_cpu(net)
    _check_output(net, name, num_classes, image_size_px)
    return net


def check_name(name: str) -> None:
    """Raise ConfigError for a net that does not exist. Imports its package, and builds nothing."""
    if is_import_path(name):
        with _working_directory_on_path():
            _import_own(name)
    elif name.startswith(timm_nets.PREFIX):
        timm_nets.pretrained_config(name)
    elif name not in _OWN:
        _check_torchvision(name)


def is_import_path(name: str) -> bool:
    """Whether a net's name means code that is imported and called."""
    return ":" in name and not name.startswith(timm_nets.PREFIX)


def skeleton(name: str, num_classes: int, image_size_px: int) -> dict[str, Tensor] | None:
    """The state dict of a known net without memory behind it; None if it needs memory to be built.

    Arguments and errors are those of `build_net`, for a name that is no import path.
    """
    net = _without_memory(name, num_classes, image_size_px)
    return None if net is None else net.state_dict()


def outline(name: str, num_classes: int, image_size_px: int) -> nn.Module:
    """A net to look at its modules: not run, and without memory behind it where that is possible.

    The user's own nets, and known ones that compute while they are built, take their memory.
    Arguments and errors are those of `build_net`.
    """
    if not is_import_path(name):
        net = _without_memory(name, num_classes, image_size_px)
        if net is not None:
            return net
    with torch.random.fork_rng(devices=[]):
        if is_import_path(name):
            return _build_own(name, num_classes)
        return _build_known(name, num_classes, image_size_px)


def _without_memory(name: str, num_classes: int, image_size_px: int) -> nn.Module | None:
    try:
        with torch.device("meta"):
            return _build_known(name, num_classes, image_size_px)
    except NotImplementedError:  # some compute with tensors while they are built
        return None


def check_training(
    net: nn.Module,
    name: str,
    batch_size: int,
    image_size_px: int,
    freeze: Callable[[], Any] = lambda: None,
    size_flag: str = _SIZE_FLAG,
) -> None:
    """Check on a dummy batch that a net can be trained. Does not change the net.

    Args:
        net: From build_net, on the CPU.
        name: Its name, for errors.
        batch_size: Images per device and step in training; more than 2 are tried as 2.
        image_size_px: Side of the square images.
        freeze: Called once the net is in training mode, to set the layers that never train back.
        size_flag: The setting that has the side of the images.

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
            net.train()
            freeze()
            output = net(torch.zeros((min(batch_size, 2), 3, image_size_px, image_size_px)))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        if "more than 1 value per channel" in str(error):
            raise ConfigError(
                f"--model.net {name} cannot train on one image at a time: a BatchNorm layer would "
                "normalise single values. --data.global_batch_size / devices / "
                "--trainer.accumulate_grad_batches must be at least 2 images, or set "
                "--model.batch_norm frozen"
            ) from error
        raise _unsuitable_size(name, image_size_px, error, size_flag) from error
    finally:
        for part, key, value, was in buffers:
            part._buffers[key] = value
            value.copy_(was)
    if not isinstance(output, Tensor):
        raise ConfigError(
            f"--model.net {name} gives a {type(output).__name__} in training; it must give logits "
            "as in evaluation"
        )


def _build_known(
    name: str, num_classes: int, image_size_px: int, options: Mapping[str, float] = _NO_OPTIONS
) -> nn.Module:
    """A net of a name that is no import path; `options` are timm's."""
    if name in _OWN:
        return _OWN[name](num_classes, image_size_px)
    if name.startswith(timm_nets.PREFIX):
        return _build_timm(name, num_classes, image_size_px, options)
    return _build_torchvision(name, num_classes, image_size_px)


def _build_timm(
    name: str, num_classes: int, image_size_px: int, options: Mapping[str, float]
) -> nn.Module:
    try:
        return timm_nets.build(name, num_classes, image_size_px, options)
    except NotImplementedError:
        raise  # see `_without_memory`
    except (RuntimeError, ValueError, AssertionError) as error:
        raise _unsuitable_size(name, image_size_px, error) from error


def _check_torchvision(name: str) -> None:
    names = torchvision_names()
    if name not in names:
        close = difflib.get_close_matches(name, [*_OWN, *names], n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "e.g. litcnn, resnet18, vit_b_16"
        raise ConfigError(
            f"--model.net '{name}' is no known net ({hint}); timm's: timm:NAME; your own: "
            "package.module:function"
        )


def _build_torchvision(name: str, num_classes: int, image_size_px: int) -> nn.Module:
    _check_torchvision(name)
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


@contextlib.contextmanager
def _working_directory_on_path() -> Iterator[None]:
    """Have modules of the working directory found, after all others, and only here.

    Later, an optional package that a library looks for would be taken from there.
    """
    here = os.getcwd()
    is_new = here not in sys.path
    if is_new:
        sys.path.append(here)
    try:
        yield
    finally:
        if is_new:
            sys.path.remove(here)


def _build_own(name: str, num_classes: int) -> nn.Module:
    with _working_directory_on_path():
        net = _import_own(name)(num_classes)
    if not isinstance(net, nn.Module):
        raise ConfigError(
            f"--model.net {name}: {name.partition(':')[2]}({num_classes}) returned a "
            f"{type(net).__name__}; it must return a torch.nn.Module"
        )
    return net


def _import_own(name: str) -> Callable[[int], Any]:
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise ConfigError(f"--model.net '{name}': expected package.module:function")
    is_new = module_name not in sys.modules
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists; something that it imports does not
        raise ConfigError(
            f"--model.net {name}: no module '{error.name}' here or on PYTHONPATH"
        ) from error
    if is_new:
        logger.info(f"--model.net {name}: imported {module.__file__}")
    build = getattr(module, function_name, None)
    if not callable(build):
        close = difflib.get_close_matches(function_name, dir(module), n=3)
        raise ConfigError(
            f"--model.net {name}: {module_name} has no function '{function_name}'"
            + (f"; did you mean {' or '.join(close)}?" if close else "")
        )
    return build


def _check_output(net: nn.Module, name: str, num_classes: int, image_size_px: int) -> None:
    shape = (2, 3, image_size_px, image_size_px)
    # Forked, so that a net that draws random numbers does not change the run's.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        net.eval()
        try:
            with noted_calls(net, num_classes) as calls:
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
    note_last_layer(net, calls, output)


def _unsuitable_size(
    name: str, image_size_px: int, error: Exception, flag: str = _SIZE_FLAG
) -> ConfigError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ConfigError(
        f"--model.net {name} fails on images of {image_size_px} px ({reason}); "
        f"set {flag} (most published nets take 224) or another net"
    )
