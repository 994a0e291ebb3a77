"""`make bench-cuda`: what only a GPU shows, in parts with a time budget, the most important first.

Each part is a process that yields rows as they are measured; when its share of the time is over it
is ended, what it has yielded counts, and what it left goes to the parts that follow. The rows, with
the machine, are also written as JSON: to $OUT if that is set, else below build/cuda.

    python -m benchmarks.cuda --budget-s 280 --data build/cuda
    python -m benchmarks.cuda --parts cifar10_96 --budget-s 200
    DEVICE=cpu python -m benchmarks.cuda     # a rehearsal: toy sizes, figures without meaning
"""

import argparse
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.cuda_part import LIMIT, PARTS
from benchmarks.table import print_table, spread

DEVICE = os.environ.get("DEVICE", "cuda")
_HEAD = ["part", "arm", "n", "images/s", "of the limit", "test accuracy", "training s",
         "whole command s", "note"]  # fmt: skip
_LEAST_S = 15.0
"""A part with less than this is not begun: its imports alone take so long."""
_TOY = {"BATCH": "4", "WINDOW": "1", "WINDOWS": "3", "SIZE_PX": "64", "STEPS": "3", "RUNS": "1",
        "WORK_MS": "0", "OMP_NUM_THREADS": "1", "WORKERS": "2", "EPOCHS": "2"}  # fmt: skip
_SIZES = {"BATCH": "256", "WINDOW": "20", "WINDOWS": "8", "STEPS": "300", "RUNS": "3",
          "WORK_MS": "0", "EPOCHS": "3"}  # fmt: skip
Row = dict[str, Any]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.cuda")
    parser.add_argument("--budget-s", type=float, default=280.0)
    parser.add_argument("--data", default="build/cuda", help="folder of `make cuda-data`")
    parser.add_argument("--parts", default=",".join(PARTS), help=", ".join(PARTS))
    asked = parser.parse_args(argv)
    parts = asked.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    ends_s, rows = time.monotonic() + asked.budget_s, []
    print(f"{machine()}; {asked.budget_s:.0f} s for {', '.join(parts)}", flush=True)
    for group, budget_s in _shares(parts, ends_s):
        if budget_s < _LEAST_S:
            rows += [_note(part, f"not run: {max(0, budget_s):.0f} s left") for part in group]
            continue
        print(f"-- {', '.join(group)}: at most {budget_s:.0f} s", flush=True)
        for row in _run(group, asked.data, budget_s):
            rows.append(row)
            print(f"   {json.dumps(row)}", flush=True)
            _write(rows)
    _write(rows)
    print_table(_HEAD, [_cells(row, rows) for row in rows])
    # A rehearsal has to come to its end; on a GPU a part that is cut short has shown what it has.
    bad = ("failed", "ended after") if DEVICE == "cpu" else ("failed",)
    failed = [row for row in rows if str(row.get("note", "")).startswith(bad)]
    return 1 if failed else 0


def machine() -> str:
    """One line that says what is measured on; a process of its own asks the GPU."""
    code = (
        "import torch; gpu = torch.cuda.is_available() and torch.cuda.get_device_name(); "
        "print(gpu or 'no GPU', 'torch', torch.__version__)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    cores = len(os.sched_getaffinity(0))
    version = platform.python_version()
    return f"{cores} cores, {platform.machine()}, Python {version}, {said.stdout.strip()}"


def _shares(parts: list[str], ends_s: float) -> Iterator[tuple[list[str], float]]:
    """Parts of one process, and its seconds: by weight, of what is left when it begins.

    A rehearsal takes one process for all, as imports are most of its time.
    """
    if DEVICE == "cpu":
        yield parts, ends_s - time.monotonic()
        return
    for index, part in enumerate(parts):
        left_s = ends_s - time.monotonic()
        yield [part], left_s * PARTS[part] / sum(PARTS[each] for each in parts[index:])


def _run(parts: list[str], data: str, budget_s: float) -> Iterator[Row]:
    """The rows of a process, as they come, and one that says so if it did not come to its end."""
    sizes = _TOY if DEVICE == "cpu" else _SIZES
    env = os.environ | sizes | {"DEVICE": DEVICE, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "benchmarks.cuda_part", data, f"{budget_s:.0f}", *parts]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    ends_s, seen = time.monotonic() + budget_s, parts[0]
    try:
        while (line := lines.get(timeout=max(0.01, ends_s - time.monotonic()))) is not None:
            if line.startswith('{"part": '):
                row = json.loads(line)
                seen = row["part"]
                yield row
        if process.wait():
            yield _note(seen, f"failed: the process ended with {process.returncode}, see its log")
    except queue.Empty:
        yield _note(seen, f"ended after its {budget_s:.0f} s")
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """End the part and what it has started: data workers, compilers, commands."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def _note(part: str, note: str) -> Row:
    return {"part": part, "arm": "", "note": note}


def _cells(row: Row, rows: list[Row]) -> list[str]:
    """A row of the table; its rate beside that of its limit, if there is one."""
    rates = row.get("images_per_s", [])
    limits = [
        each["images_per_s"]
        for each in rows
        if each.get("part") == row["part"] and each.get("of") == row.get("of") and each.get(LIMIT)
    ]
    shares = [rate / max(limits[0]) for rate in rates] if limits and not row.get(LIMIT) else []
    return [
        row["part"],
        row["arm"],
        str(row.get("n", len(rates) or "")),
        spread(rates) if rates else "",
        spread(shares, 3) if shares else "",
        *(
            spread(row[key], digits) if row.get(key) else ""
            for key, digits in (("accuracy", 4), ("training_s", 2), ("command_s", 1))
        ),
        row.get("note", ""),
    ]


def _write(rows: list[Row]) -> None:
    folder = Path(os.environ.get("OUT") or "build/cuda/out")
    folder.mkdir(parents=True, exist_ok=True)
    content = {"device": DEVICE, "rows": rows}
    (folder / "bench-cuda.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
