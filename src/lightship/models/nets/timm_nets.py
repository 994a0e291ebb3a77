"""timm's nets: the one module that imports timm, an optional package (`lightship[timm]`)."""

import difflib
import inspect
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from lightship.errors import ConfigError
from lightship.extras import INSTALL

PREFIX = "timm:"


def pretrained_config(name: str) -> Any:
    """timm's `PretrainedCfg` of `timm:NAME` or `timm:NAME.TAG`; None if it has no weights.

    Raises:
        ConfigError: timm is not installed, or has no such net or tag.
    """
    timm = _timm(name)
    plain = name.removeprefix(PREFIX)
    if not timm.is_model(plain):
        close = difflib.get_close_matches(plain, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(PREFIX + each for each in close)}?" if close else ""
        raise ConfigError(f"--model.net {name}: timm {timm.__version__} has no such net{hint}")
    try:
        config = timm.get_pretrained_cfg(plain, allow_unregistered=False)
    except RuntimeError as error:  # no such tag
        near = [PREFIX + each for each in timm.list_pretrained(f"{plain.partition('.')[0]}.*")[:5]]
        raise ConfigError(f"--model.net {name}: {error} There are {', '.join(near)}") from None
    return config if config is not None and config.has_weights else None


def build(
    name: str, num_classes: int, image_size_px: int, options: Mapping[str, float]
) -> nn.Module:
    """The net `timm:NAME` with random weights.

    Args:
        name: `timm:NAME`.
        num_classes: Width of the output.
        image_size_px: Side of the square images.
        options: More arguments of `timm.create_model`.

    Raises:
        ConfigError: The net does not take an option.
        NotImplementedError: On the device meta, if the net needs memory to be built.
        RuntimeError, ValueError, AssertionError: As timm does for an unsuitable size.
    """
    try:
        return _build(name, num_classes, image_size_px, options)
    except TypeError as error:
        if not (unknown := [option for option in options if option in str(error)]):
            raise
        raise ConfigError(f"--model.net {name} has no {unknown[0]}: {error}") from error
    except RuntimeError as error:
        if "meta tensor" in str(error):
            raise NotImplementedError(str(error)) from error
        raise


def _build(
    name: str, num_classes: int, image_size_px: int, options: Mapping[str, float]
) -> nn.Module:
    timm, config = _timm(name), pretrained_config(name)
    plain = name.removeprefix(PREFIX)
    if config is None or config.input_size[1:] != (image_size_px, image_size_px):
        try:  # nets that are built for one size
            return timm.create_model(
                plain, num_classes=num_classes, img_size=image_size_px, **options
            )
        except TypeError as error:
            if "img_size" not in str(error):
                raise
    return timm.create_model(plain, num_classes=num_classes, **options)


def synchronized_norm(kind: Any) -> Any:
    """timm's SyncBatchNorm with an activation, for its BatchNorm with one; None for others."""
    layers = sys.modules.get("timm.layers")  # a net with such layers has imported it
    if layers is None or kind.forward is not layers.BatchNormAct2d.forward:
        return None
    return layers.SyncBatchNormAct


def parameter_groups(net: Any, coarse: bool) -> list[list[str]] | None:
    """Names of the parameters by depth, as timm's `--layer-decay` has them.

    Args:
        net: Of timm.
        coarse: By stages instead of blocks.

    Returns:
        None: timm has no such groups for this net (of RDNet no stages), which it asserts.
    """
    from timm.models import group_parameters

    try:
        matcher = net.group_matcher(coarse=coarse)
    except AssertionError:
        return None
    groups = group_parameters(net, matcher)
    return [groups[number] for number in sorted(groups)]


def adapted(state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """A net's weights with the names and shapes of this version of timm and of this image size.

    By the module's `checkpoint_filter_fn`, which timm applies to every file that it loads; a
    convention of timm's, so where there is none the weights stay as they are.
    """
    change = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if not type(net).__module__.startswith("timm.") or change is None:
        return state
    arguments = (state, net)[: len(inspect.signature(change).parameters)]
    return dict(change(*arguments))


def _timm(name: str) -> Any:
    if find_spec("timm") is None:
        raise ConfigError(f"--model.net {name} needs the package timm: {INSTALL['timm']}")
    import timm

    return timm
