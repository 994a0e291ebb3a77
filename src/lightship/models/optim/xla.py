"""The optimizers for devices that compile a step: numbers that change per step are tensors.

torch.optim passes them as Python numbers, which XLA uploads one by one and deduplicates by value.
If two become equal (a learning rate that reaches 0, a decay that rounds to 1), the step is a
different program and is compiled again.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightship.models.optim.stepping import SteppingOptimizer

ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8


class TracedOptimizer(SteppingOptimizer):
    """Adam, AdamW, SGD (Nesterov) and both Muons, equal to torch.optim and muon.py.

    The numbers of a step are computed on the host in double precision, per group, and uploaded in
    one tensor. State names are those of torch.optim and muon.py, and group settings come from this
    run, not from the checkpoint, so a run can be resumed on another kind of device.

    Args:
        groups: Parameter groups, each with `rule` (adam, adamw, sgd, muon, muon-sgd) and
            `weight_decay`; a group's `lr` and `momentum` override those below.
        lr: Learning rate.
        momentum: Momentum of sgd and both muons.
        orthogonalize: A function of matrices and iterations (see `muon.orthogonalize`).
        record_iterations: Newton-Schulz iterations of muon-sgd.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        momentum: float,
        orthogonalize: Callable[[Tensor, int], Tensor],
        record_iterations: int,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum})
        self.orthogonalize = orthogonalize
        self.record_iterations = record_iterations

    def move(self) -> None:
        """See SteppingOptimizer."""
        members = [[p for p in g["params"] if p.grad is not None] for g in self.param_groups]
        pairs = list(zip(self.param_groups, members, strict=True))
        numbers = torch.tensor([self._numbers(g, self._advance(g, params)) for g, params in pairs])
        sent = numbers.to(self.param_groups[0]["params"][0].device, non_blocking=True)
        for index, (group, params) in enumerate(pairs):
            rate, decay, spread = sent[index, 0], sent[index, 1], sent[index, 2]
            if group["rule"] in ("muon", "muon-sgd"):
                self._step_muon(group, params, rate, decay)
                continue
            for param in params:
                if group["rule"] == "sgd":
                    self._step_sgd(group, param, rate)
                else:
                    self._step_adam(group, param, rate, decay, spread)

    def _advance(self, group: dict[str, Any], params: list[Tensor]) -> float:
        """Count the step in Adam's state (on the CPU, so reading it does not synchronize)."""
        steps = 0.0
        if group["rule"] in ("adam", "adamw"):
            for param in params:
                count = self.state[param].setdefault("step", torch.zeros(()))
                count += 1
                steps = count.item()  # the same for all parameters of a group
        return steps

    def _numbers(self, group: dict[str, Any], steps: float) -> tuple[float, float, float]:
        """Factor of the update, factor of the weight, divisor of Adam's deviation."""
        lr, decay, spread = group["lr"], 1 - group["lr"] * group["weight_decay"], 1.0
        if steps:
            lr /= 1 - ADAM_BETAS[0] ** steps
            spread = math.sqrt(1 - ADAM_BETAS[1] ** steps)
        return lr, decay, spread

    def _kept(self, param: Tensor, name: str) -> Tensor:
        """A tensor of a parameter's state, initially zero."""
        state = self.state[param]
        if name not in state:
            state[name] = torch.zeros_like(param)
        return state[name]

    def _step_adam(
        self, group: dict[str, Any], param: Tensor, rate: Tensor, decay: Tensor, spread: Tensor
    ) -> None:
        grad = param.grad
        assert grad is not None
        if group["rule"] == "adam" and group["weight_decay"]:
            grad = grad.add(param, alpha=group["weight_decay"])
        elif group["weight_decay"]:
            param.mul_(decay)
        mean, square = self._kept(param, "exp_avg"), self._kept(param, "exp_avg_sq")
        mean.lerp_(grad, 1 - ADAM_BETAS[0])
        square.mul_(ADAM_BETAS[1]).addcmul_(grad, grad, value=1 - ADAM_BETAS[1])
        param.sub_(rate * mean / (square.sqrt() / spread + ADAM_EPS))

    def _step_sgd(self, group: dict[str, Any], param: Tensor, rate: Tensor) -> None:
        grad = param.grad
        assert grad is not None
        if group["weight_decay"]:
            grad = grad.add(param, alpha=group["weight_decay"])
        if group["momentum"]:
            velocity = self._kept(param, "momentum_buffer").mul_(group["momentum"]).add_(grad)
            grad = grad.add(velocity, alpha=group["momentum"])
        param.sub_(rate * grad)

    def _step_muon(
        self, group: dict[str, Any], params: list[Tensor], rate: Tensor, decay: Tensor
    ) -> None:
        of_record = group["rule"] == "muon-sgd"
        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for param in params:
            assert param.grad is not None
            average = self._kept(param, "momentum").lerp_(param.grad, 1 - group["momentum"])
            direction = param.grad.lerp(average, group["momentum"]).flatten(1)
            if of_record:
                param.mul_(math.sqrt(len(param)) / torch.linalg.vector_norm(param))
            elif group["weight_decay"]:
                param.mul_(decay)
            alike[direction.shape].append((param, direction))
        for shape, pairs in alike.items():
            iterations = self.record_iterations if of_record else 5
            scale = 1.0 if of_record else 0.2 * math.sqrt(max(shape))
            matrices = torch.stack([direction for _, direction in pairs])
            updates = self.orthogonalize(matrices, iterations)
            for (param, _), update in zip(pairs, updates, strict=True):
                param.sub_(update.view(param.shape) * (rate * scale))
