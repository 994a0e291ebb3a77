"""Flags that any rank may raise and all ranks act on at the same step."""

from typing import Any

import torch
import torch.distributed as dist

from lightship.distributed import comm


class Agreement:
    """One small all-reduce every `every_steps` steps.

    It runs on a process group of its own on the CPU (gloo), so the device's stream is not touched.
    With one process there is no communication at all.
    """

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps
        self._group: Any = None

    def open(self) -> None:
        """Make the group. Called on every rank before training. Blocks for the others."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = comm.new_cpu_group()

    def any_rank(self, step: int, *flags: bool, now: bool = False) -> list[bool]:
        """Each flag as any rank has it; all False on the steps in between, unless it is `now`.

        Every rank, with the same `step` and `now`; blocks for the others.
        """
        if self._group is None:
            return list(flags)
        if step % self.every_steps and not now:
            return [False] * len(flags)
        raised = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in raised.tolist()]
