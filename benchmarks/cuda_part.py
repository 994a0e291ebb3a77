"""Some parts of `make bench-cuda` in this process: a line of JSON for each row that is measured."""

import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PARTS = {
    "speed": 44.0,
    "resnet50": 18.0,
    "finetune": 13.0,
    "stream": 9.0,
    "overhead": 5.0,
    "cifar10_96": 11.0,
}
"""Name -> weight of its share of the time; the most important first."""
LIMIT = "is_limit"
"""Key of a row whose rate is the limit of the others with the same `of`."""


@dataclass(frozen=True)
class Job:
    """What a part is given.

    Attributes:
        data: The folder of `make cuda-data`, whose archives may be missing.
        folder: An empty folder.
        ends_s: When its time is over, by time.monotonic().
        is_toy: Whether this is a rehearsal on the CPU.
    """

    data: str
    folder: str
    ends_s: float
    is_toy: bool

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self.ends_s - time.monotonic()

    @property
    def accelerator(self) -> list[str]:
        """The flags of lightship."""
        return [f"--trainer.accelerator={'cpu' if self.is_toy else 'gpu'}", "--trainer.devices=1"]


def main(data: str, budget_s: float, parts: list[str]) -> None:
    ends_s = time.monotonic() + budget_s
    for part in parts:
        module = importlib.import_module(f"benchmarks.cuda_{part}")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            job = Job(os.path.abspath(data), folder, ends_s, os.environ.get("DEVICE") == "cpu")
            for row in _rows(part, module.rows(job)):
                print(json.dumps({"part": part, **row}), flush=True)


def _rows(part: str, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The part's rows, and one for an error that ends it."""
    try:
        yield from rows
    except Exception as error:
        traceback.print_exc()
        yield {"arm": "", "note": f"failed: {type(error).__name__}: {error}"[:300]}


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3:])
