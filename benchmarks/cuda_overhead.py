"""Part `overhead`: what each stack adds to a step of a net with next to no work."""

from collections.abc import Iterator
from typing import Any

from benchmarks import step_overhead
from benchmarks.cuda_part import LIMIT, Job


def rows(job: Job) -> Iterator[dict[str, Any]]:
    """Steps a second times the batch; ms a step and waits for the device as notes."""
    for name, steps, waits in step_overhead.whole_steps():
        rates = [1000 * step_overhead.BATCH / step.whole for step in steps]
        note = f"{sorted(step.whole for step in steps)[len(steps) // 2]:.3f} ms a step"
        note += f", {waits} waits a step" if waits else ""
        is_limit = name == "bare loop"
        yield {"arm": name, "images_per_s": rates, LIMIT: is_limit, "note": note}
