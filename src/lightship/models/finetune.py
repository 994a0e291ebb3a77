"""What of a net trains, and how fast: frozen layers, and learning rates by depth."""

from collections.abc import Collection, Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightship.config import FREEZE
from lightship.errors import ConfigError
from lightship.models.nets.structure import check_head, head_parameters, layers

_LEAST_SCALE = 0.01


def frozen_parameters(net: nn.Module, name: str, freeze: str) -> list[str]:
    """Names of the parameters that a setting freezes.

    Args:
        net: The net. What it has frozen itself is left out.
        name: Its name, for the error.
        freeze: none, backbone (all but the head) or stages:N (the first N stages, the stem
            included; see `structure.layers`).

    Raises:
        ConfigError: The net has fewer stages, its head is not known, or the setting (of a
            checkpoint) is none of these.
    """
    if not FREEZE.fullmatch(freeze):
        raise ConfigError(f"model.freeze is {freeze!r:.80}; it must be none, backbone or stages:N")
    if freeze == "none":
        return []
    check_head(net, f"--model.freeze {freeze}")
    stages = layers(net, coarse=True)[:-1]
    count = len(stages)
    if freeze != "backbone":
        count = int(freeze.removeprefix("stages:"))
    if count > len(stages):
        titles = ", ".join(stage.title for stage in stages)
        raise ConfigError(
            f"--model.freeze {freeze}: {name} has {len(stages)} stages before its head ({titles})"
        )
    chosen = {parameter for stage in stages[:count] for parameter in stage.parameters}
    return [key for key, each in net.named_parameters() if key in chosen and each.requires_grad]


def set_frozen(net: nn.Module, names: Collection[str], is_frozen: bool) -> bool:
    """Freeze or unfreeze parameters. Frozen modules are in evaluation mode.

    In that mode BatchNorm keeps its running statistics, and dropout is off.

    Args:
        net: The net.
        names: Of `frozen_parameters`.
        is_frozen: Whether they are frozen from now on.

    Returns:
        Whether that is a change.
    """
    parameters = {name: net.get_parameter(name) for name in names}
    changed = any(each.requires_grad == is_frozen for each in parameters.values())
    for each in parameters.values():
        each.requires_grad_(not is_frozen)
    if changed or is_frozen:
        for part in _whole_modules(net, names):
            part.train(not is_frozen)
    return changed


def batch_norms(net: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that keep running statistics."""
    return [
        part for part in net.modules() if isinstance(part, _BatchNorm) and part.track_running_stats
    ]


def check_batch_norm(net: nn.Module, name: str, batch_norm: str) -> None:
    """Raise ConfigError if statistics are to be computed, and the net has none.

    `frozen` has no effect then: one recipe fits nets with BatchNorm and without.
    """
    if batch_norm == "precise" and not batch_norms(net):
        raise ConfigError(
            f"--model.batch_norm precise: {name} has no BatchNorm layers that keep statistics; "
            "leave it out"
        )


def _whole_modules(net: nn.Module, names: Collection[str]) -> Iterable[nn.Module]:
    """The modules of parameters among `names`, and of none else but what the net froze itself."""
    chosen = {id(net.get_parameter(name)) for name in names}
    for part in net.modules():
        own = list(part.parameters())
        others = [each for each in own if id(each) not in chosen]
        if len(others) < len(own) and not any(each.requires_grad for each in others):
            yield part


def freeze_statistics(net: nn.Module) -> None:
    """Have BatchNorm layers in training mode use and keep their running statistics.

    A batch of 16 to 64 images of few classes has statistics of its own, which differ from those
    that the weights know, and running ones lag behind weights that change fast.
    """
    for part in batch_norms(net):
        part.eval()


def lr_scales(net: nn.Module, layer_decay: float, head_lr_scale: float) -> dict[str, float]:
    """Factor of the learning rate by a parameter's name.

    The head's is `head_lr_scale`, that of the layer before it `layer_decay`; each layer before has
    `layer_decay` times the rate of the next (Clark et al. 2020, arXiv 2003.10555; as timm's
    --layer-decay), but at least a hundredth: the first of DenseNet's 62 layers would not move else.

    Raises:
        ConfigError: A factor is not 1, and the net's head is not known.
    """
    if layer_decay == head_lr_scale == 1.0:
        return {}
    check_head(net, f"--optim.layer_decay {layer_decay:g}, --optim.head_lr_scale {head_lr_scale:g}")
    found = layers(net)
    scales = [max(_LEAST_SCALE, layer_decay**after) for after in reversed(range(len(found)))]
    scales[-1] = head_lr_scale
    return {
        name: scale for layer, scale in zip(found, scales, strict=True) for name in layer.parameters
    }


def rates_line(
    net: nn.Module,
    lr: float,
    layer_decay: float,
    head_lr_scale: float,
    frozen: Collection[str],
    unfreeze_epoch: int | None,
) -> str:
    """How many parameters train, at which peak learning rates, and how many are frozen."""
    counts = {name: each.numel() for name, each in net.named_parameters()}
    trained = [name for name, each in net.named_parameters() if each.requires_grad]
    trained = [name for name in trained if name not in frozen]
    scales, head = lr_scales(net, layer_decay, head_lr_scale), set(head_parameters(net))
    parts = []
    for title, names in (
        ("head", [name for name in trained if name in head]),
        ("layers before it" if head else "all", [name for name in trained if name not in head]),
    ):
        if names:
            shown = _least_to_most(lr * scales.get(name, 1.0) for name in names)
            parts.append(f"{title} {sum(counts[name] for name in names):,} at {shown}")
    if frozen:
        until = then = ""
        if unfreeze_epoch is not None:
            until = f" until epoch {unfreeze_epoch}"
            then = f", then at {_least_to_most(lr * scales.get(name, 1.0) for name in frozen)}"
        count = sum(counts[name] for name in frozen)
        parts.append(f"{count:,} frozen{until}{then}")
    return f"parameters and peak learning rates: {'; '.join(parts)}"


def _least_to_most(rates: Iterable[float]) -> str:
    ordered = sorted({f"{rate:.3g}": rate for rate in rates}.items(), key=lambda each: each[1])
    return " to ".join(text for text, _ in ordered[:1] + ordered[1:][-1:])
