"""Optimizers by name, and learning-rate schedules as functions of the step."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightship import devices
from lightship.errors import ConfigError
from lightship.models.finetune import lr_scales
from lightship.models.optim import decay
from lightship.models.optim.muon import RECORD_ITERATIONS, Muon, MuonSGD, orthogonalize
from lightship.models.optim.xla import ADAM_BETAS, ADAM_EPS, TracedOptimizer

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
_MATRIX_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


@dataclass(frozen=True)
class SGDPart:
    """The SGD settings of muon-sgd.

    Attributes:
        lr: Peak learning rate of biases and norms. Like `head_lr`, for the mean loss of a global
            batch (airbench's are for the sum).
        head_lr: Peak learning rate of the classifier.
        momentum: Nesterov momentum.
        early_fraction: Fraction of all steps in which the bias of a frozen first layer is trained.
    """

    lr: float = 0.05
    head_lr: float = 0.05
    momentum: float = 0.85
    early_fraction: float = 0.375


def build_optimizer(
    net: nn.Module,
    name: str = "adam",
    lr: float = 2e-4,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    fused: bool = True,
    rest: SGDPart | None = None,
    layer_decay: float = 1.0,
    head_lr_scale: float = 1.0,
    late: Collection[str] = (),
    decay_version: int = decay.NEWEST,
) -> Optimizer:
    """Build the optimizer of a net whose parameters are already on their device.

    Args:
        net: The net; frozen parameters are ignored.
        name: adam, adamw, sgd (Nesterov), muon or muon-sgd.
        lr: Peak learning rate.
        momentum: Momentum of sgd and both muons.
        weight_decay: Of matrices and filters (see `decay.decayed_parameters`). With muon-sgd:
            fraction by which all weights but the filters shrink in a step at the peak
            learning rate.
        fused: Use fused kernels if the device has them.
        rest: Settings of muon-sgd for all parameters but the hidden matrices.
        layer_decay: See `finetune.lr_scales`; not with muon-sgd.
        head_lr_scale: Likewise.
        late: Names of parameters that are frozen at first. They have groups of their own, as
            optimizers count the steps by group.
        decay_version: See `decay.decayed_parameters`; not with muon-sgd.

    Returns:
        One optimizer for all parameters, also with the muons. It can load a state that another
        kernel or class wrote on another kind of device.
    """
    if name == "muon-sgd":
        groups = _record_groups(net, weight_decay, rest or SGDPart())
    else:
        scales = lr_scales(net, layer_decay, head_lr_scale)
        decays = dict.fromkeys(decay.decayed_parameters(net, decay_version), weight_decay)
        groups = _groups(net, name, decays, late, scales)
        for group in groups if scales else ():
            group["lr"] = lr * group["lr_scale"]
    optimizer = _build(groups, name, lr, momentum, fused)
    optimizer.register_load_state_dict_pre_hook(_keep_settings)
    optimizer.register_load_state_dict_post_hook(_lay_like_parameters)
    return optimizer


_RATES = ("lr", "initial_lr")


def _keep_settings(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Take parameters and learning rate of a group from the checkpoint, the rest from this run.

    Raises:
        ConfigError: See `_check_state`.
    """
    _check_state(optimizer, state)
    kept = ("params", *_RATES)
    groups = [
        {**ours, **{name: group[name] for name in kept if name in group}}
        for ours, group in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    return {**state, "param_groups": groups}


def _check_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Raise ConfigError for a state that is not of these parameters; files come from anywhere."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    ids = [number for group in state["param_groups"] for number in group["params"]]
    sizes = dict(zip(ids, map(Tensor.numel, params), strict=True))
    for number, values in state["state"].items():
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.numel() == 1:
                continue
            if value.numel() != sizes.get(number) or not value.is_floating_point():
                raise ConfigError(
                    f"the checkpoint's optimizer has {name!r:.80} of {list(value.shape)}, "
                    f"{value.dtype}, for parameter {number!r:.80} of {sizes.get(number)} values"
                )
    rates = [group[key] for group in state["param_groups"] for key in _RATES if key in group]
    if not all(math.isfinite(rate) for rate in rates):
        raise ConfigError("the checkpoint's optimizer has a learning rate that is not finite")


def _lay_like_parameters(optimizer: Optimizer) -> None:
    """Give the state the memory format of its parameters, which fused kernels assume.

    A state from a device without channels_last would otherwise be read in the wrong order.
    """
    for param, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == param.shape:
                state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)


def _build(
    groups: list[dict[str, Any]], name: str, lr: float, momentum: float, fused: bool
) -> Optimizer:
    kinds = {p.device for group in groups for p in group["params"]}
    if any(devices.of(kind).compiles_steps for kind in kinds):
        others = {"muon": "adamw", "muon-sgd": "sgd"}.get(name, name)
        traced = [{**group, "rule": name if group["orthogonal"] else others} for group in groups]
        return TracedOptimizer(traced, lr, momentum, orthogonalize, RECORD_ITERATIONS)
    fused &= all(kind.type in _FUSED_DEVICES for kind in kinds)
    if name in ("muon", "muon-sgd"):
        kind_of_muon = Muon if name == "muon" else MuonSGD
        return kind_of_muon(groups, lr=lr, momentum=momentum, fused=fused)
    for group in groups:
        del group["orthogonal"]
    use_fused = fused or None  # False would also rule out the multi-tensor kernels
    if name == "sgd":
        return torch.optim.SGD(
            groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=use_fused
        )
    assert name in ("adam", "adamw"), name
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(groups, lr=lr, betas=ADAM_BETAS, eps=ADAM_EPS, fused=use_fused)


def _groups(
    net: nn.Module,
    name: str,
    decays: Mapping[str, float],
    late: Collection[str],
    scales: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Groups by decay, by rate and, for Muon, of hidden matrices, in the net's order."""
    hidden = {id(matrix) for matrix in _matrices(net)[1:-1]} if name == "muon" else set()
    members: dict[tuple[Any, ...], list[nn.Parameter]] = defaultdict(list)
    for key, parameter in net.named_parameters():
        if parameter.requires_grad:
            at = id(parameter) in hidden, decays.get(key, 0.0), scales.get(key, 1.0), key in late
            members[at].append(parameter)
    return [
        {"params": params, "weight_decay": rate, "orthogonal": orthogonal}
        | ({"lr_scale": scale} if scales else {})
        for (orthogonal, rate, scale, _), params in members.items()
    ]


def _record_groups(net: nn.Module, weight_decay: float, rest: SGDPart) -> list[dict[str, Any]]:
    """airbench94_muon's groups: hidden matrices, classifier, early, other.

    Early is the bias of a first layer whose weight is frozen (a whitening layer); it is trained at
    the start only. SGD's decay is divided by the learning rate, so that a weight shrinks by the
    fraction `weight_decay` per step at the peak, whatever its learning rate.
    """
    layers = [module for module in net.modules() if isinstance(module, _MATRIX_LAYERS)]
    matrices = _matrices(net)
    kind_of: dict[int, str] = {}
    if matrices and not matrices[0].requires_grad:
        kind_of |= {id(parameter): "early" for parameter in layers[0].parameters()}
    if layers:
        kind_of |= {id(parameter): "head" for parameter in layers[-1].parameters()}
    kind_of |= {id(matrix): "hidden" for matrix in matrices[1:-1]}
    members: dict[str, list[nn.Parameter]] = {"hidden": [], "head": [], "early": [], "other": []}
    for parameter in net.parameters():
        if parameter.requires_grad:
            members[kind_of.get(id(parameter), "other")].append(parameter)
    by_sgd = {"momentum": rest.momentum, "orthogonal": False}
    settings: dict[str, dict[str, Any]] = {
        "hidden": {"weight_decay": 0.0, "orthogonal": True},
        "head": {**by_sgd, "lr": rest.head_lr, "weight_decay": weight_decay / rest.head_lr},
        "early": {
            **by_sgd,
            "lr": rest.lr,
            "weight_decay": weight_decay / rest.lr,
            "ends_at": rest.early_fraction,
        },
        "other": {**by_sgd, "lr": rest.lr, "weight_decay": weight_decay / rest.lr},
    }
    return [{"params": params, **settings[kind]} for kind, params in members.items() if params]


def _matrices(net: nn.Module) -> list[nn.Parameter]:
    """The matrices and filters, from the first layer to the classifier, in the net's order."""
    matrices = []
    for module in net.modules():
        if isinstance(module, _MATRIX_LAYERS):
            attention = isinstance(module, nn.MultiheadAttention)
            matrix = module.in_proj_weight if attention else module.weight
            if isinstance(matrix, nn.Parameter):
                matrices.append(matrix)
    return matrices


def lr_scale(
    step: int,
    total_steps: float,
    warmup_steps: int = 0,
    schedule: str = "constant",
    final_fraction: float = 0.0,
) -> float:
    """Learning rate of a step as a fraction of the peak: pure, so resuming needs no state.

    Args:
        step: Optimizer steps before this one (0 is the first).
        total_steps: Optimizer steps of the whole run (infinity: only with `constant`).
        warmup_steps: Steps of linear warm-up; the next one is at the peak.
        schedule: constant, cosine (Loshchilov & Hutter 2017, arXiv 1608.03983) or linear.
        final_fraction: Fraction of the peak at the last step, `total_steps - 1` (not `constant`).
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    assert math.isfinite(total_steps), "cosine and linear need the number of steps"
    done = min(1.0, (step - warmup_steps) / max(1.0, total_steps - 1 - warmup_steps))
    assert schedule in ("cosine", "linear"), schedule
    left = (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done
    return final_fraction + (1 - final_fraction) * left


def build_schedule(
    optimizer: Optimizer,
    total_steps: float,
    schedule: str = "constant",
    warmup_fraction: float = 0.0,
    final_lr_fraction: float = 0.0,
) -> LambdaLR:
    """Build the schedule of `lr_scale`, stepped once per optimizer step.

    Args:
        optimizer: The learning rates of its groups are the peak. A group with `ends_at`, a fraction
            of total_steps, decays linearly to 0 until there instead.
        total_steps: Optimizer steps of the whole run; infinity if nothing depends on it.
        schedule: constant, cosine or linear.
        warmup_fraction: Fraction of total_steps with linear warm-up.
        final_lr_fraction: Fraction of the peak at the last step.
    """
    warmup_steps = round(warmup_fraction * total_steps) if warmup_fraction else 0

    def scale(step: int) -> float:
        return lr_scale(step, total_steps, warmup_steps, schedule, final_lr_fraction)

    def scale_to_end(ends_at: float) -> Callable[[int], float]:
        last = round(ends_at * total_steps)
        return lambda step: max(0.0, 1 - step / last) if last else 0.0

    return LambdaLR(
        optimizer,
        [
            scale_to_end(group["ends_at"]) if "ends_at" in group else scale
            for group in optimizer.param_groups
        ],
    )
