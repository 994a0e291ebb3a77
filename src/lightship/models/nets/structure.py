"""The structure of a net: its head, its layers in order of depth, and its stages."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from lightship.errors import ConfigError
from lightship.models.nets import last_layer, timm_nets

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_FEWEST_STAGES = 4


class Layer(NamedTuple):
    """A part of a net that is frozen, or has its learning rate, as a whole.

    Attributes:
        title: Name of the module that holds it, else of its first one.
        parameters: Names of its parameters.
    """

    title: str
    parameters: list[str]


def head_parameters(net: nn.Module) -> list[str]:
    """Names of the classifier's parameters; empty if it is not known.

    Those of the modules that timm's `get_classifier` names, all inside included; else of what gave
    the logits of the dummy batch of `build_net`; of a net that was not built there, of its last
    matrix or filter.
    """
    parts = _classifiers(net)
    if not any(True for part in parts for _ in part.parameters()):
        if (names := last_layer.noted(net)) is not None:
            return names
        kinds = (nn.Linear, nn.Conv2d)
        parts = [*filter(lambda part: isinstance(part, kinds), net.modules())][-1:]
    inside = {id(parameter) for part in parts for parameter in part.parameters()}
    return [name for name, parameter in net.named_parameters() if id(parameter) in inside]


def _classifiers(net: nn.Module) -> list[nn.Module]:
    """The modules that a net of timm names as its classifiers; volo's second one has no getter."""
    if not hasattr(net, "get_classifier"):
        return []
    found = net.get_classifier()  # type: ignore[operator]
    several = isinstance(found, tuple | list | nn.ModuleList)
    parts = [*(found if several else [found]), getattr(net, "aux_head", None)]
    return [part for part in parts if isinstance(part, nn.Module)]


def check_head(net: nn.Module, flag: str) -> None:
    """Raise ConfigError, naming the setting that needs it, if a net's last layer is not known."""
    if not head_parameters(net):
        raise ConfigError(
            f"{flag} needs a last layer: no module of --model.net has weights and gives the "
            "logits; end the net with one, such as nn.Linear"
        )


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def layers(net: nn.Module, coarse: bool = False) -> list[Layer]:
    """A net's parameters in order of depth, from the input to the head.

    Args:
        net: timm's nets group their parameters themselves (`group_matcher`), as its training script
            does. Of others, the children are the layers; in place of a container (nn.Sequential)
            or a module with most of the parameters, its children. So of timm's nets that have no
            stages in that way.
        coarse: Stages (of a ResNet: stem, layer1 to layer4, head) instead of layers (blocks).

    Returns:
        At least one layer; the last one is the head.
    """
    head = head_parameters(net)
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    by_timm = timm_nets.parameter_groups(net, coarse) if hasattr(net, "group_matcher") else None
    groups = by_timm or _groups_by_modules(net, coarse)
    found: list[Layer] = []
    for group in groups:
        # A weight that two modules share has one name here, in the first of them.
        names = [name for name in group if name in shapes and name not in head]
        if found and not any(len(shapes[name]) > 1 for name in names):
            found[-1].parameters.extend(names)  # a norm belongs to the layer before it
        elif names:
            found.append(Layer(_title(names), names))
    return [*found, Layer(_title(head), head)] if head else found


def _title(names: list[str]) -> str:
    shared: list[str] = []
    for parts in zip(*(_owner(name).split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or _owner(names[0]) or names[0]


def _groups_by_modules(net: nn.Module, coarse: bool) -> list[list[str]]:
    parts = _opened(net) if coarse else [*_children(net, "", _size(net))]
    prefixes = tuple(prefix for prefix, _ in parts)
    groups = [[f"{prefix}{name}" for name, _ in part.named_parameters()] for prefix, part in parts]
    # What belongs to none (a class token) is added to the input.
    others = [name for name, _ in net.named_parameters() if not name.startswith(prefixes)]
    return [[*others, *groups[0]], *groups[1:]] if groups else [others]


def _children(net: nn.Module, prefix: str, total: int) -> Iterator[tuple[str, nn.Module]]:
    for below, part in _direct_children(net, prefix):
        is_open = isinstance(part, _CONTAINERS) or 2 * _size(part) > total
        children = [*_children(part, below, total)] if is_open else []
        yield from children or [(below, part)]


def _opened(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children; the largest gives place to its own until there are enough."""
    parts, whole = _direct_children(net, ""), set()
    while len(parts) - 1 < _FEWEST_STAGES:
        largest = max(
            (at for at in range(len(parts)) if parts[at][0] not in whole),
            key=lambda at: _size(parts[at][1]),
            default=None,
        )
        if largest is None:
            break
        prefix, part = parts[largest]
        children = _direct_children(part, prefix)
        whole.add(prefix)
        if children:
            parts[largest : largest + 1] = children
    return parts


def _direct_children(net: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    children = [(f"{prefix}{name}.", part) for name, part in net.named_children()]
    return [(below, part) for below, part in children if _size(part)]


def _size(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())
