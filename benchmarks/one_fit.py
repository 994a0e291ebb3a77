"""One `lightship fit` in this process; prints its numbers and the seconds of training alone."""

import json
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightship import cli, storage
from lightship.models.classifier import ImageClassifier

_FIRST_STEPS = 10 if torch.cuda.is_available() else 2


class StepClock(Callback):
    """Times the steps after the first ones, in which a net is compiled; waits for no device.

    On CUDA by events in the device's stream, as cifar10-airbench does.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[int, Any]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Mark the end of the first steps."""
        if trainer.global_step == _FIRST_STEPS and not self._marks:
            self._mark(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the end."""
        self._mark(trainer)

    def _mark(self, trainer: Trainer) -> None:
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((trainer.global_step, event))
        else:
            self._marks.append((trainer.global_step, time.perf_counter()))

    def step_s(self) -> float:
        """Seconds of a step; NaN where there were only first ones."""
        (first, began), (last, ended) = self._marks[0], self._marks[-1]
        if first == last:
            return float("nan")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return float(began.elapsed_time(ended)) / 1000 / (last - first)
        return float(ended - began) / (last - first)


def measure(output: str, flags: list[str]) -> dict[str, Any]:
    """The numbers of a fit, its steps, and the seconds of all, of one, of starting from images."""
    spent_s: list[float] = []
    clock = StepClock()
    fit, set_up = Trainer.fit, ImageClassifier.init_from_images

    def timed(trainer: Trainer, *args, **kwargs):
        trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        began_s = time.perf_counter()
        fit(trainer, *args, **kwargs)
        spent_s.append(time.perf_counter() - began_s)

    whitened_s = [0.0]

    def timed_set_up(*args):
        began_s = time.perf_counter()
        set_up(*args)
        whitened_s[0] = time.perf_counter() - began_s

    Trainer.fit = timed  # type: ignore[method-assign]
    ImageClassifier.init_from_images = timed_set_up  # type: ignore[method-assign]
    try:
        code = cli.main(["fit", "--run.output", output, *flags])
    finally:
        Trainer.fit = fit  # type: ignore[method-assign]
        ImageClassifier.init_from_images = set_up  # type: ignore[method-assign]
    assert code == 0, f"lightship fit ended with {code}"
    numbers = json.loads(storage.read_bytes(storage.join(output, "DONE")))
    rows = storage.read_bytes(storage.join(output, "logs", "metrics.csv")).decode().splitlines()
    step = int(float(rows[-1].split(",")[0]))
    times = {"fit_s": spent_s[0], "step_s": clock.step_s(), "init_s": whitened_s[0]}
    return {**numbers, **times, "steps": step}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2:])))
