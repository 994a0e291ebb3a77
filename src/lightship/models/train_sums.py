"""Training loss and accuracy since the last log point, at almost no cost per step."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightship import devices
from lightship.data.batch import NOT_COUNTED, Batch

_STEPS_AT_ONCE = 32


class _Step(NamedTuple):
    loss: Tensor
    guesses: Tensor
    batch: Batch


class TrainSums:
    """Sums over training steps, on the device: loss, hits, counted rows. Does not synchronize.

    In a short step even small operations are expensive: the launch on a GPU, cold instruction
    caches on a CPU. So results of steps are kept (16 bytes per row) and summed many at a time.
    Where steps are compiled (XLA), each step is summed alone.
    """

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._sums: Tensor | None = None

    def add(self, loss: Tensor, logits: Tensor, batch: Batch) -> None:
        """Add a step.

        Args:
            loss: [] summed over the counted rows.
            logits: [B, C].
            batch: The batch. Its labels must not be modified later.
        """
        batch = batch._replace(images=batch.labels)  # drops the pixels
        if self._steps and (self._steps[0].batch.mix_weight is None) != (batch.mix_weight is None):
            self._fold()
        self._steps.append(_Step(loss.detach(), logits.detach().argmax(1), batch))
        at_once = 1 if devices.of(loss.device).compiles_steps else _STEPS_AT_ONCE
        if len(self._steps) >= at_once:
            self._fold()

    def value(self) -> Tensor | None:
        """[3] loss, hits and counted rows, in the device's widest float type; None: no step."""
        self._fold()
        return self._sums

    def restart(self, sums: Tensor | None = None) -> None:
        """Reset, to zero or to an earlier `value`."""
        self._steps, self._sums = [], sums

    def _fold(self) -> None:
        if not self._steps:
            return
        losses, guesses, batches = zip(*self._steps, strict=True)
        self._steps = []
        labels = torch.cat([batch.labels for batch in batches])
        guessed = torch.cat(guesses)
        counted = labels != NOT_COUNTED
        hits = (guessed == labels).float()
        if batches[0].mix_weight is not None:
            mixed_hits = (guessed == torch.cat([batch.mixed_labels for batch in batches])).float()
            weight = torch.cat([batch.mix_weight.float() for batch in batches])
            hits = torch.lerp(mixed_hits, hits, weight) * counted
        wide = devices.of(labels.device).widest_float
        parts = (torch.stack(losses), hits, counted)
        sums = torch.stack([part.sum(dtype=wide) for part in parts])
        if self._sums is None:
            # Moved to the device, not created there: on XLA that would be a program of its own.
            self._sums = torch.zeros(3, dtype=wide).to(sums.device, non_blocking=True)
        self._sums = self._sums.to(sums.device).add_(sums)
