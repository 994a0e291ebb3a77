"""Whole commands: seconds to the first line, to the first step and to the end, at two starts.

CIFAR10=FOLDER RUNS=3 make bench TABLES=start      # real CIFAR-10 as class folders
COUNT=3000 JOBS=imports,digits,cifar10,s3 make bench TABLES=start
"""

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from benchmarks import start_imports, stream_images, stream_peers
from benchmarks.stream import CACHE, upload
from benchmarks.table import machine, print_table, spread
from tests.support.s3 import S3Server

RUNS = int(os.environ.get("RUNS", "1"))
COUNT = int(os.environ.get("COUNT", "3000"))
JOBS = os.environ.get("JOBS", "imports,digits,cifar10,s3").split(",")
TUTORIAL_EPOCHS = 2
_STEP = re.compile(r'"event": "(pace|train|val)"|^first step')
"""The first line that follows a step: of lightship's JSON lines, or of a peer."""
_IMPORTED, _DECODED = '"text": "imports have ended"', re.compile(r"images were decoded (\S+) s ago")
"""What lightship logs at the level debug; the second with the age of the first decoded split."""
Times = dict[str, float]


@dataclass(frozen=True)
class Arm:
    """A command that is started twice: `command` makes it from (root, folder for its output)."""

    job: str
    name: str
    command: Callable[[str, str], list[str]]


def main() -> None:
    """whole commands, interleaved: first line, first step, end; first start and second start"""
    print(f"{machine()}; n = {RUNS}; median (range)\n")
    if "imports" in JOBS:
        start_imports.show(RUNS)
    with _roots() as (roots, env):
        arms = [arm for arm in ARMS if arm.job in roots]
        results: dict[tuple[Arm, int], list[Times]] = {}
        for run in range(RUNS):
            with tempfile.TemporaryDirectory() as folder:
                for start in (1, 2):
                    for arm in arms:
                        place = Path(folder, f"{ARMS.index(arm)}")
                        own = env | {"LIGHTSHIP_CACHE": str(place / "cache")}
                        command = arm.command(roots[arm.job], str(place / f"run{start}"))
                        times = _timed(command, own, start == 1)
                        results.setdefault((arm, start), []).append(times)
                        line = f"  run {run + 1}/{RUNS}  {arm.job}, {arm.name}, start {start}"
                        print(f"{line}: {json.dumps(times)}", file=sys.stderr, flush=True)
    head = ["job", "arm", "start", *_COLUMNS.values()]
    rows = [
        [arm.job, arm.name, str(start), *(_cell(runs, name) for name in _COLUMNS)]
        for (arm, start), runs in results.items()
    ]
    if not rows:
        return
    print_table(head, rows)
    print(
        "\nFirst step: the first line after it. The second start is another run on the same images,"
    )
    print("with the caches that the first one has left. CPU: of the process and all it waited for.")
    print("Decoded: when the first split was, after the end of the imports; before it if below 0.")


_COLUMNS = {
    "line": "first line s",
    "decoded": "decoded s",
    "step": "first step s",
    "whole": "whole s",
    "cpu": "CPU s",
    "accuracy": "accuracy",
}
"""What is measured -> its column."""


def _cell(runs: list[Times], name: str) -> str:
    values = [run[name] for run in runs if name in run]
    return spread(values, 3 if name == "accuracy" else 1) if values else ""


@contextlib.contextmanager
def _roots() -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Job -> root of its images, of those that can be run; and the environment."""
    roots = {}
    env = dict(os.environ)
    if "digits" in JOBS:
        roots["digits"] = str(CACHE / "digits")
        with zipfile.ZipFile(str(resources.files("lightship") / "data/digits.zip")) as archive:
            archive.extractall(roots["digits"])
    if "cifar10" in JOBS and (folder := os.environ.get("CIFAR10")):
        roots["cifar10"] = folder
        for path in Path(folder).rglob("*.*"):  # or the first arm alone would wait for the disk
            path.read_bytes()
    elif "cifar10" in JOBS:
        print("cifar10: not run: set CIFAR10 to a folder with train/CLASS/IMAGE and test/CLASS/...")
    if "s3" not in JOBS:
        yield roots, env
        return
    with S3Server() as s3:
        images = stream_images.image_folder(CACHE, COUNT, stream_peers.photographs())
        roots["s3"] = upload(images, s3, s3.url("images"))
        yield roots, env | s3.env


def _timed(command: list[str], env: dict[str, str], is_first: bool) -> Times:
    """Run a command; seconds from its start to its lines and its end."""
    began_s, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    times: Times = {}
    lines, imported_s = [], 0.0
    process = subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        now_s = time.perf_counter() - began_s
        times.setdefault("line", now_s)
        if _STEP.search(line):
            times.setdefault("step", now_s)
        if _IMPORTED in line:
            imported_s = now_s
        # At a second start nothing is decoded: what is there already is as old as the first.
        if is_first and "decoded" not in times and (found := _DECODED.search(line)):
            times["decoded"] = now_s - float(found[1]) - imported_s
        if found := re.search(r'"test/acc": ([\d.]+)', line):
            times["accuracy"] = float(found[1])
    if process.wait():
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(lines)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    times["whole"] = time.perf_counter() - began_s
    times["cpu"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return times


def _lightship(*flags: str) -> Callable[[str, str], list[str]]:
    def command(root: str, out: str) -> list[str]:
        of_run = [f"--data.root={root}", f"--run.output={out}", "--run.log_format=json"]
        of_run += ["--run.log_level=debug"]
        return [sys.executable, "-m", "lightship", "fit", *flags, *of_run]

    return command


def _module(name: str, *flags: str) -> Callable[[str, str], list[str]]:
    return lambda root, out: [sys.executable, "-m", f"benchmarks.{name}", root, *flags, out]


ARMS = [
    Arm(
        "digits",
        "lightship --config digits",
        lambda _, out: _lightship("--config=digits")("digits", out),
    ),
    Arm("digits", "bare script, 15 epochs", _module("start_bare", str(15 * 45), "32")),
    Arm(
        "cifar10",
        "lightship --config cifar10, 70 steps",
        _lightship("--config=cifar10", "--trainer.max_steps=70"),
    ),
    Arm("cifar10", "bare script, 70 steps", _module("start_bare", "70", "256")),
    Arm(
        "cifar10",
        "tutorial as written, 2 epochs",
        _module("tutorial_as_written", "0", str(TUTORIAL_EPOCHS)),
    ),
    Arm(
        "s3",
        f"lightship, folder of {COUNT} images, 20 steps",
        _lightship(
            "--model.net=litcnn", "--data.image_size_px=64", "--data.crop_min_area=0.3",
            "--data.global_batch_size=128", "--trainer.max_steps=20",
        ),
    ),
    Arm("s3", "bare script over s3fs, 20 steps", _module("start_bare_s3", "20", "128")),
]  # fmt: skip
