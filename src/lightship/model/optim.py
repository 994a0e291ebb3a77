"""How weights move: the optimizers by name, Muon, and learning rates as functions of the step."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR

from lightship import devices
from lightship.model.traced_optim import ADAM_BETAS, ADAM_EPS, TracedOptimizer

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
_MATRIX_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


def build_optimizer(
    net: nn.Module,
    name: str = "adam",
    lr: float = 2e-4,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    fused: bool = True,
) -> Optimizer:
    """Build the optimizer of a net whose parameters are already on their device.

    Args:
        net: The net; parameters that need no gradient are left out.
        name: adam, adamw, sgd (Nesterov) or muon.
        lr: Peak learning rate.
        momentum: Of sgd and muon.
        weight_decay: Of parameters with two or more dimensions; biases and norms do not decay.
        fused: Use the fused kernels where the device has them.

    Returns:
        An optimizer; with muon one object that also moves what is no hidden matrix. What it loads
        may come from a device for which another kernel, or another class, does the same.
    """
    optimizer = _build(net, name, lr, momentum, weight_decay, fused)
    optimizer.register_load_state_dict_pre_hook(_keep_settings)
    optimizer.register_load_state_dict_post_hook(_lay_like_parameters)
    return optimizer


def _keep_settings(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Take from a checkpoint a group's parameters and rate; how to move them is this run's."""
    kept = ("params", "lr", "initial_lr")
    groups = [
        {**ours, **{name: group[name] for name in kept if name in group}}
        for ours, group in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    return {**state, "param_groups": groups}


def _lay_like_parameters(optimizer: Optimizer) -> None:
    """Give the state the parameters' own memory order, which fused kernels take for granted.

    A state from a device that knows no channels_last would otherwise be read in the wrong order.
    """
    for param, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == param.shape:
                state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)


def _build(
    net: nn.Module, name: str, lr: float, momentum: float, weight_decay: float, fused: bool
) -> Optimizer:
    matrices = {id(matrix) for matrix in _hidden_matrices(net)} if name == "muon" else set()
    members: dict[tuple[bool, float], list[nn.Parameter]] = defaultdict(list)
    for parameter in net.parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            members[id(parameter) in matrices, decay].append(parameter)
    kinds = {p.device for group in members.values() for p in group}
    if any(devices.of(kind).compiles_steps for kind in kinds):
        rest = "adamw" if name == "muon" else name
        traced = [
            {"params": params, "weight_decay": decay, "rule": "muon" if orthogonal else rest}
            for (orthogonal, decay), params in members.items()
        ]
        return TracedOptimizer(traced, lr, momentum, orthogonalize)
    fused &= all(kind.type in _FUSED_DEVICES for kind in kinds)
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": decay}
        | ({"orthogonal": orthogonal} if name == "muon" else {})
        for (orthogonal, decay), params in members.items()
    ]
    if name == "muon":
        return Muon(groups, lr=lr, momentum=momentum, fused=fused)
    use_fused = fused or None  # False would also rule out the multi-tensor kernels
    if name == "sgd":
        return torch.optim.SGD(
            groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=use_fused
        )
    assert name in ("adam", "adamw"), name
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(groups, lr=lr, betas=ADAM_BETAS, eps=ADAM_EPS, fused=use_fused)


def _hidden_matrices(net: nn.Module) -> list[nn.Parameter]:
    """The matrices and filters between the first layer and the classifier, in the net's order."""
    matrices = []
    for module in net.modules():
        if isinstance(module, _MATRIX_LAYERS):
            attention = isinstance(module, nn.MultiheadAttention)
            matrix = module.in_proj_weight if attention else module.weight
            if isinstance(matrix, nn.Parameter):
                matrices.append(matrix)
    return matrices[1:-1]


class Muon(Optimizer):
    """Momentum orthogonalised by Newton-Schulz for hidden matrices, AdamW for all else.

    Muon is Keller Jordan's (https://kellerjordan.github.io/posts/muon): filters are flattened to
    [out, in*kh*kw]; the first layer and the classifier are better left to AdamW (build_optimizer
    does so). Each update is scaled by 0.2*sqrt(max(rows, columns)), so that its size is AdamW's
    and one learning rate and decay serve both (Liu et al. 2025, arXiv 2502.16982, section 2.2).
    Matrices of one shape are orthogonalised in one batched product.

    Args:
        groups: Parameter groups, each with `orthogonal: bool` and `weight_decay: float`
            (decoupled).
        lr: Learning rate.
        momentum: Nesterov momentum of the orthogonal groups.
        fused: Use the fused AdamW kernel.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.95, fused: bool = False
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "fused": fused})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters that have a gradient; never waits for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._step_orthogonal if group["orthogonal"] else self._step_adamw)(group, params)
        return loss

    def _step_orthogonal(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for param in params:
            if not self.state[param]:
                self.state[param]["momentum"] = torch.zeros_like(param)
        grads = [param.grad for param in params if param.grad is not None]
        averages = [self.state[param]["momentum"] for param in params]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        directions = torch._foreach_lerp(grads, averages, momentum)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = defaultdict(list)
        for index, matrix in enumerate(direction.flatten(1) for direction in directions):
            alike[matrix.shape, matrix.dtype, matrix.device].append(index)
        for (shape, _, _), indices in alike.items():
            updates = orthogonalize(torch.stack([directions[i].flatten(1) for i in indices]))
            torch._foreach_add_(
                [params[i] for i in indices],
                [update.view(params[i].shape) for i, update in zip(indices, updates, strict=True)],
                alpha=-lr * 0.2 * math.sqrt(max(shape)),
            )

    def _step_adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:
            if not self.state[param]:
                # The fused kernel counts on the device; elsewhere a count on the CPU costs no sync.
                device = param.device if group["fused"] else "cpu"
                self.state[param] = {
                    "step": torch.zeros((), dtype=torch.float32, device=device),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }
        states = [self.state[param] for param in params]
        adamw(
            params,
            [param.grad for param in params if param.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"] or None,
            amsgrad=False,
            beta1=ADAM_BETAS[0],
            beta2=ADAM_BETAS[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=ADAM_EPS,
            maximize=False,
        )


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Push the singular values of each matrix towards 1 by Newton-Schulz iterations.

    Args:
        matrices: [N, rows, columns], floating point.
        iterations: Quintic steps; after five the singular values lie within about 0.7..1.2.

    Returns:
        The same shape and dtype. Coefficients and scheme: Keller Jordan's Muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    # bfloat16 suffices (ibid.), where it is fast.
    work = matrices.bfloat16() if devices.has_bf16_units(matrices.device) else matrices.float()
    tall = work.shape[1] > work.shape[2]
    if tall:
        work = work.mT
    work = work / (torch.linalg.matrix_norm(work, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = work @ work.mT
        work = torch.baddbmm(work, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), work, beta=a)
    return (work.mT if tall else work).to(matrices.dtype).contiguous()


def lr_scale(
    step: int,
    total_steps: float,
    warmup_steps: int = 0,
    schedule: str = "constant",
    final_fraction: float = 0.0,
) -> float:
    """Learning rate of a step as a share of the peak: a pure function, so resuming needs no state.

    Args:
        step: Optimizer steps done before this one (0 is the first).
        total_steps: Optimizer steps of the whole run (infinity: only with `constant`).
        warmup_steps: The rate rises linearly over so many steps; the next one is at the peak.
        schedule: constant, cosine (Loshchilov & Hutter 2017, arXiv 1608.03983) or linear.
        final_fraction: Share of the peak at the last step, `total_steps - 1` (not of `constant`).
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
    """Build the schedule of `lr_scale`, to be stepped once an optimizer step.

    Args:
        optimizer: Its groups' learning rates are the peak.
        total_steps: Optimizer steps of the whole run; may be infinity if nothing depends on it.
        schedule: constant, cosine or linear.
        warmup_fraction: Share of total_steps in which the rate rises.
        final_lr_fraction: Share of the peak at the last step.
    """
    warmup_steps = round(warmup_fraction * total_steps) if warmup_fraction else 0

    def scale(step: int) -> float:
        return lr_scale(step, total_steps, warmup_steps, schedule, final_lr_fraction)

    return LambdaLR(optimizer, scale)
