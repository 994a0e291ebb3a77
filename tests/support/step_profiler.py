"""Which operations a range of training steps calls, all hooks of all callbacks included."""

import torch
from lightning.pytorch import Callback

SYNCS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::is_nonzero",
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
}
"""Operations, and calls of CUDA's runtime, that wait for the device."""
_RANGE = "profiled steps"


class StepProfiler(Callback):
    """Counts what the steps from `first` up to `last` call.

    Attributes:
        counts: Name of an operation, or of a call of CUDA's runtime -> how often.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        activities = torch.profiler.supported_activities()
        self.profile = torch.profiler.profile(activities=list(activities))
        self.range = torch.profiler.record_function(_RANGE)
        self.counts: dict[str, int] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.first:
            self.profile.start()
            self.range.__enter__()  # the profiler itself waits for the device before and after
        elif trainer.global_step == self.last and not self.counts:
            self.range.__exit__(None, None, None)
            self.profile.stop()
            self._count()

    def _count(self) -> None:
        events = self.profile.events()
        whole = next(event for event in events if event.name == _RANGE).time_range
        for event in events:
            is_within = whole.start <= event.time_range.start < whole.end
            if is_within and not _in_fused_adam(event):
                self.counts[event.name] = self.counts.get(event.name, 0) + 1

    @property
    def syncs(self) -> dict[str, int]:
        """Those of the counts that wait for the device."""
        return {name: count for name, count in self.counts.items() if name in SYNCS}


def _in_fused_adam(event) -> bool:
    """Adam's CPU kernel reads its step count, a CPU tensor; on a GPU the count stays there."""
    while event is not None:
        if event.name.startswith("aten::_fused_adam"):
            return True
        event = event.cpu_parent
    return False
