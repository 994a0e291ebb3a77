"""Muon: orthogonalized momentum for filters and matrices, AdamW or SGD for other parameters."""

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from lightship import devices
from lightship.models.optim.stepping import SteppingOptimizer
from lightship.models.optim.xla import ADAM_BETAS, ADAM_EPS

RECORD_ITERATIONS = 3
"""Newton-Schulz iterations of airbench94_muon: coarser than Muon's five, as accurate there."""


class OrthogonalOptimizer(SteppingOptimizer):
    """Orthogonalized Nesterov momentum for groups marked `orthogonal`, `rest` for the others.

    Muon is Keller Jordan's (https://kellerjordan.github.io/posts/muon). Filters are flattened to
    [out, in*kh*kw]. The first layer and the classifier should use the other optimizer
    (build_optimizer does so). Matrices of one shape are orthogonalized in one batched product.

    Args:
        groups: Parameter groups, each with `orthogonal: bool` and `weight_decay: float`.
        lr: Learning rate.
        momentum: Nesterov momentum of the orthogonal groups.
        build_rest: Builds the optimizer of the other groups; both share groups and state.
    """

    iterations = 5

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        momentum: float,
        build_rest: Callable[[list[dict[str, Any]]], Optimizer],
    ) -> None:
        others = [group for group in groups if not group["orthogonal"]]
        self.rest = build_rest(others) if others else None  # adds its settings to the groups
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    def move(self) -> None:
        """See SteppingOptimizer."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["orthogonal"]:
                self._step_orthogonal(group, params)
        if self.rest:
            # load_state_dict replaces both.
            self.rest.state = self.state
            self.rest.param_groups = [g for g in self.param_groups if not g["orthogonal"]]
            self.rest.step()

    def _step_orthogonal(self, group: dict[str, Any], params: list[Tensor]) -> None:
        momentum = group["momentum"]
        for param in params:
            if not self.state[param]:
                self.state[param]["momentum"] = torch.zeros_like(param)
        grads = [param.grad for param in params if param.grad is not None]
        averages = [self.state[param]["momentum"] for param in params]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        directions = torch._foreach_lerp(grads, averages, momentum)
        self._shrink(group, params)
        alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = defaultdict(list)
        for index, matrix in enumerate(direction.flatten(1) for direction in directions):
            alike[matrix.shape, matrix.dtype, matrix.device].append(index)
        for (shape, _, _), indices in alike.items():
            matrices = torch.stack([directions[i].flatten(1) for i in indices])
            updates = orthogonalize(matrices, self.iterations)
            torch._foreach_add_(
                [params[i] for i in indices],
                [update.view(params[i].shape) for i, update in zip(indices, updates, strict=True)],
                alpha=-group["lr"] * self._update_scale(shape),
            )

    def _shrink(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Scale the parameters before the update is added."""
        raise NotImplementedError

    def _update_scale(self, shape: torch.Size) -> float:
        """Factor of an orthogonalized update of this shape, in addition to the learning rate."""
        raise NotImplementedError


class Muon(OrthogonalOptimizer):
    """Muon for hidden matrices, AdamW for all other parameters.

    Each update is scaled by 0.2*sqrt(max(rows, columns)) to the size of AdamW's, so both use the
    same learning rate and weight decay (Liu et al. 2025, arXiv 2502.16982, section 2.2).

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
        rest = partial(AdamW, lr=lr, betas=ADAM_BETAS, eps=ADAM_EPS, fused=fused or None)
        super().__init__(groups, lr, momentum, rest)

    def _shrink(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])

    def _update_scale(self, shape: torch.Size) -> float:
        return 0.2 * math.sqrt(max(shape))


class MuonSGD(OrthogonalOptimizer):
    """Muon for filters of fixed norm, SGD (Nesterov) for all other parameters.

    The optimizer of airbench94_muon (Keller Jordan, https://github.com/KellerJordan/cifar10-airbench):
    before each step, a weight with `out` filters is scaled to the norm sqrt(out), so it needs no
    weight decay; its update has three Newton-Schulz iterations and no other scale.

    Args:
        groups: Parameter groups, each with `orthogonal: bool`, and the others with
            `weight_decay: float`, added to the gradient as torch.optim.SGD does. A group's own `lr`
            and `momentum` override those below.
        lr: Learning rate.
        momentum: Nesterov momentum.
        fused: Use the fused SGD kernel.
    """

    iterations = RECORD_ITERATIONS

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.6, fused: bool = False
    ) -> None:
        rest = partial(SGD, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=fused or None)
        super().__init__(groups, lr, momentum, rest)

    def _shrink(self, group: dict[str, Any], params: list[Tensor]) -> None:
        norms = torch._foreach_norm(params)
        torch._foreach_reciprocal_(norms)
        torch._foreach_mul_(norms, [math.sqrt(len(param)) for param in params])
        torch._foreach_mul_(params, norms)

    def _update_scale(self, shape: torch.Size) -> float:
        return 1.0


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Push the singular values of each matrix towards 1 by Newton-Schulz iterations.

    Args:
        matrices: [N, rows, columns], floating point.
        iterations: Quintic iterations; after five, the singular values are about 0.7 to 1.2.

    Returns:
        The same shape and dtype. Coefficients and scheme: Keller Jordan's Muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    # bfloat16 is accurate enough (ibid.).
    work = matrices.bfloat16() if devices.has_bf16_units(matrices.device) else matrices.float()
    tall = work.shape[1] > work.shape[2]
    if tall:
        work = work.mT
    work = work / (torch.linalg.matrix_norm(work, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = work @ work.mT
        work = torch.baddbmm(work, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), work, beta=a)
    return (work.mT if tall else work).to(matrices.dtype).contiguous()
