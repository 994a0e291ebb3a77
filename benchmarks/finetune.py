"""A pretrained net fine-tuned on real photographs, by lightship and by the usual scripts.

A seed of all arms takes over an hour on 2 cores. RESULTS=FILE appends each arm's numbers to a file
of JSON lines and does not measure again what is in it, so that a run can be interrupted; the table
is of all seeds in it. benchmarks/results/finetune.jsonl has those of docs/measurements.md.
"""

import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.finetune_data import NET, macro_f1
from benchmarks.stream_peers import python_of
from benchmarks.table import machine, print_table, run_json, spread
from lightship.config import DataConfig
from lightship.data.held_out import split_validation
from lightship.data.sources import layouts

RUNS = int(os.environ.get("RUNS", "1"))
SEEDS = [int(seed) for seed in os.environ.get("SEEDS", "").split(",") if seed] or range(RUNS)
EPOCHS = int(os.environ.get("EPOCHS", "0"))
NAMES = [name for name in os.environ.get("ARMS", "").split(",") if name]
RESULTS = os.environ.get("RESULTS")
ARMS = {
    "tutorial-3": ("PyTorch's tutorial, 3 epochs", "tutorial", 3, "all"),
    "tutorial": ("PyTorch's tutorial, as written (25 epochs)", "tutorial", 25, "all"),
    "tutorial-frozen": ("the same with a frozen backbone", "tutorial", 25, "frozen"),
    "transformers": ("transformers' Trainer, its defaults (3 epochs)", "transformers", 3),
    "timm": ("timm, 10 epochs", "timm", 10),
    "finetune": ("lightship, --config finetune", "lightship", 0, "finetune"),
    "finetune-probe": ("lightship, --config finetune-probe", "lightship", 0, "finetune-probe"),
}
_KEPT = "acc", "macro_f1", "fit_s", "process_s", "cpu_s"
Runs = dict[str, dict[int, dict[str, Any]]]
"""The numbers of each arm, by seed."""


def main() -> None:
    """fine-tuning (TRASHNET=, WEIGHTS=lite0 as .safetensors; ARMS=, SEEDS=, RESULTS=)"""
    root, weights = os.environ.get("TRASHNET"), os.environ.get("WEIGHTS")
    if not root or not weights:
        print("not run: set TRASHNET to a folder with train/CLASS/IMAGE and test/CLASS/IMAGE, and "
              "WEIGHTS to the weights of tf_efficientnet_lite0 as .safetensors")  # fmt: skip
        return
    names = [name for name in ARMS if not NAMES or name in NAMES]
    runs = _kept()
    for seed in SEEDS:
        for name in names:
            if seed not in runs[name]:
                runs[name][seed] = _measure(ARMS[name][1:], root, weights, seed)
                _keep(name, seed, runs[name][seed])
    print(f"{machine()}; n = {max(map(len, runs.values()))}; median (range)\n")
    print_table(*_table({name: runs[name] for name in names}))


def _kept() -> Runs:
    runs: Runs = {name: {} for name in ARMS}
    if RESULTS and Path(RESULTS).exists():
        for run in map(json.loads, Path(RESULTS).read_text().splitlines()):
            runs[run["arm"]][run["seed"]] = run
    return runs


def _keep(name: str, seed: int, found: dict[str, Any]) -> None:
    print(f"  seed {seed}  {name}: {found}", file=sys.stderr, flush=True)
    if RESULTS:
        commit = ["git", "rev-parse", "--short", "HEAD"]
        of = subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip()
        about = {"arm": name, "seed": seed, "date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": of}
        with open(RESULTS, "a") as file:
            file.write(json.dumps(about | {key: round(found[key], 4) for key in _KEPT}) + "\n")


def _table(runs: Runs) -> tuple[list[str], list[list[str]]]:
    """Its last column compares whole commands of the same seed.

    Runs without seconds had other work beside them.
    """
    whole_s = {
        name: {seed: run["process_s"] for seed, run in seeds.items() if "process_s" in run}
        for name, seeds in runs.items()
    }
    ours = whole_s.get("finetune", {})
    rows = []
    for name, seeds in runs.items():
        each = list(seeds.values())
        beside = [spent / ours[seed] for seed, spent in whole_s[name].items() if seed in ours]
        rows.append([
            ARMS[name][0],
            str(len(each)),
            *(_cell(each, key, 3) for key in ("acc", "macro_f1")),
            *(_cell(each, key) for key in ("fit_s", "process_s", "cpu_s")),
            spread(beside, 2) if beside else "",
        ])  # fmt: skip
    head = ["arm", "n", "test accuracy", "macro F1", "training s", "whole command s", "CPU s",
            "of finetune's"]  # fmt: skip
    return head, rows


def _cell(runs: list[dict[str, Any]], key: str, digits: int = 0) -> str:
    values = [run[key] for run in runs if key in run]
    return spread(values, digits) if values else ""


def _measure(arm: tuple, root: str, weights: str, seed: int) -> dict[str, Any]:
    kind, epochs, *options = arm
    if kind == "lightship":
        return _lightship(root, weights, seed, *options)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as listed:
        _write_splits(root, listed.name)
        return run_json(
            f"benchmarks.finetune_{kind}", listed.name, weights, str(seed), str(EPOCHS or epochs),
            *options,
            python=python_of("transformers") if kind == "transformers" else sys.executable,
        )  # fmt: skip


def _write_splits(root: str, path: str) -> None:
    """The images as lightship takes them, with its validation split, for the peers."""
    found = layouts.scan(root)
    train, val = split_validation(found["train"], DataConfig.val_fraction)
    parts = {"train": train, "val": val, "test": found["test"]}
    samples = {
        name: [(m.url(m.file_index[i]), int(m.label[i])) for i in range(len(m))]
        for name, m in parts.items()
    }
    content = {"splits": samples, "classes": train.class_names}
    Path(path).write_text(json.dumps(content))


def _lightship(root: str, weights: str, seed: int, recipe: str) -> dict[str, Any]:
    epochs = [f"--trainer.max_epochs={EPOCHS}"] if EPOCHS else []
    with tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/run"
        found = run_json(
            "benchmarks.one_fit", output, f"--config={recipe}", f"--data.root={root}",
            f"--model.net=timm:{NET}", f"--model.weights={weights}", f"--run.seed={seed}",
            "--run.tracking=none", *epochs,
        )  # fmt: skip
        table = json.loads(Path(output, "report/report.json").read_text())["confusion"]
    counts = np.array(table)
    return {**found, "acc": found["test/acc"], "macro_f1": macro_f1(counts)}
