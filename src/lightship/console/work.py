"""Progress of work without a trainer: pack and predict."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from lightship.console.display import Display, finite


@contextmanager
def work_progress(display: Display, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function to be called often with (done, total), in `unit` ("images").

    It shows what is due, and the end; the speed is the average since the first call.
    """
    first: list[tuple[float, int]] = []
    last_shown = -1

    def show(done: int, total: int) -> None:
        nonlocal last_shown
        now = monotonic()
        if not first:
            first.append((now, done))
            display.postpone()
            display.begin()
        if display.is_due() or done == total > last_shown:
            spent_s, new = now - first[0][0], done - first[0][1]
            per_s = new / spent_s if spent_s > 0 else 0.0
            left_s = finite((total - done) / per_s if per_s else math.inf)
            facts = {"unit": unit, "done": done, "total": total, "per_s": round(per_s, 3)}
            last_shown = done
            display.postpone()
            display.show("work", {**facts, "left_s": left_s})

    try:
        yield show
    finally:
        display.end()
