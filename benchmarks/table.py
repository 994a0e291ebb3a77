"""Interleaved measurements and the tables they are printed as."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch


def run_json(module: str, *arguments: str, python: str = sys.executable) -> dict[str, Any]:
    """Run `python -m module arguments` in a fresh process; its last line of output is JSON.

    Added are the wall time of the whole process as `process_s`, and its processor time, with that
    of its own children, as `cpu_s`.
    """
    began_s, before_s = time.perf_counter(), _children_s()
    command = [python, "-m", module, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    spent = {"process_s": time.perf_counter() - began_s, "cpu_s": _children_s() - before_s}
    return {**result, **spent}


def _children_s() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def machine() -> str:
    """One line that says what was measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, {platform.machine()}, {device}, torch {torch.__version__}"


def spread(values: list[float], digits: int = 0) -> str:
    """Median and range of n values."""
    if len(values) == 1:
        return f"{values[0]:,.{digits}f}"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("| " + " | ".join(cells) + " |", flush=True)
