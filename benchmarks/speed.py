"""cifar10-speed beside the record it is made after, on the same images."""

import math
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.table import machine, print_table, run_json, spread

RUNS = int(os.environ.get("RUNS", "3"))
EPOCHS = float(os.environ.get("SPEED_EPOCHS", "1"))
BATCH, STEPS_PER_EPOCH = 2000, 25


def main() -> None:
    """cifar10-speed beside airbench94_muon: accuracy an image seen, speed (SPEED_EPOCHS=0.5)"""
    root, airbench = os.environ.get("CIFAR10"), os.environ.get("AIRBENCH_DIR")
    if not root:
        print("not run: set CIFAR10 to a folder with train/CLASS/IMAGE and test/CLASS/IMAGE")
        return
    on_gpu = torch.cuda.is_available()
    epochs = 8.0 if on_gpu else EPOCHS
    arms: dict[str, Callable[[int, str], dict[str, Any]] | None] = {
        "airbench94_muon, float32": _airbench(airbench, root, epochs) if not on_gpu else None,
        "airbench94_muon unmodified, CUDA": _airbench(airbench, root, 8) if on_gpu else None,
        "lightship --config cifar10-speed, float32": _lightship(root, epochs, "32-true"),
        "lightship --config cifar10-speed": _lightship(root, epochs, "bf16-mixed"),
        "bare loop, bf16 (limit)": lambda seed, out: run_json(
            "benchmarks.speed_bare", root, "10", "1"
        ),
    }
    if "ARMS" in os.environ:
        arms = {name: arms[name] for name in os.environ["ARMS"].split(";")}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for seed in range(RUNS):
        for name, measure in arms.items():
            if measure is None or (seed and "unmodified" in name):  # it does 200 runs by itself
                continue
            with tempfile.TemporaryDirectory() as out:
                results[name].append(measure(seed, out))
            print(f"  run {seed + 1}/{RUNS}  {name}: {results[name][-1]}", file=sys.stderr)
    print(f"{machine()}; {epochs:g} epochs of the schedule; n = {RUNS}; median (range)\n")
    rows = [_row(name, runs) for name, runs in results.items()]
    print_table(
        ["arm", "images seen", "test accuracy", "images/s", "training s", "command s"], rows
    )


def _row(name: str, runs: list[dict[str, Any]]) -> list[str]:
    """Training by airbench's own clock: whitening and steps, without compiling and evaluation.

    It compiles in a run before; ours in its first steps, which count as long as the others.
    """
    if not runs:
        return [name, *["not run"] * 5]
    accuracy = spread([run["test/acc"] for run in runs], 4) if "test/acc" in runs[0] else ""
    if "seconds" in runs[0]:
        seconds = runs[0]["seconds"]
        rates, accuracy = (
            [8 * 50_000 / one for one in seconds],
            f"{accuracy} ± {runs[0]['std']:.4f}",
        )
        return [name, "400,000", accuracy, spread(rates), spread(seconds, 2), ""]
    seconds = [run["train_s"] for run in runs]
    rates = [run["images"] / one for run, one in zip(runs, seconds, strict=True)]
    whole = spread([run["process_s"] for run in runs], 1) if name.startswith("lightship") else ""
    images = f"{runs[0]['images']:,}"
    return [name, images, accuracy, spread(rates), spread(seconds, 2), whole]


def _airbench(
    folder: str | None, root: str, epochs: float
) -> Callable[[int, str], dict[str, Any]] | None:
    if not folder:
        return None
    flags = [folder, root]
    return lambda seed, out: run_json("benchmarks.speed_airbench", *flags, str(seed), str(epochs))


def _lightship(root: str, epochs: float, precision: str) -> Callable[[int, str], dict[str, Any]]:
    steps = math.ceil(STEPS_PER_EPOCH * epochs)  # as airbench counts them

    def measure(seed: int, out: str) -> dict[str, Any]:
        found = run_json(
            "benchmarks.one_fit", f"{out}/run", "--config=cifar10-speed",
            f"--data.root={root}", f"--run.seed={seed}", f"--trainer.max_steps={steps}",
            f"--trainer.precision={precision}", "--run.tracking=offline",
            f"--optim.final_lr_fraction={1 / steps}",  # airbench's last rate
        )  # fmt: skip
        assert found["steps"] == steps
        train_s = found["init_s"] + found["step_s"] * steps
        return {**found, "images": steps * BATCH, "train_s": train_s}

    return measure
