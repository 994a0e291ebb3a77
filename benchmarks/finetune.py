"""A pretrained net fine-tuned on real photographs, by lightship and by the usual scripts."""

import json
import os
import sys
import tempfile
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
ARMS = [name for name in os.environ.get("ARMS", "").split(",") if name]


def main() -> None:
    """fine-tuning on TrashNet (TRASHNET=FOLDER, WEIGHTS=lite0 as .safetensors; ARMS=, SEEDS=)"""
    root, weights = os.environ.get("TRASHNET"), os.environ.get("WEIGHTS")
    if not root or not weights:
        print("not run: set TRASHNET to a folder with train/CLASS/IMAGE and test/CLASS/IMAGE, and "
              "WEIGHTS to the weights of tf_efficientnet_lite0 as .safetensors")  # fmt: skip
        return
    arms = {
        "tutorial-3": ("PyTorch's tutorial, 3 epochs", "tutorial", 3, "all"),
        "tutorial": ("PyTorch's tutorial, as written (25 epochs)", "tutorial", 25, "all"),
        "tutorial-frozen": ("the same with a frozen backbone", "tutorial", 25, "frozen"),
        "transformers": ("transformers' Trainer, its defaults (3 epochs)", "transformers", 3),
        "timm": ("timm, 10 epochs", "timm", 10),
        "finetune": ("lightship, --config finetune", "lightship", 0, "finetune"),
        "finetune-probe": ("lightship, --config finetune-probe", "lightship", 0, "finetune-probe"),
    }
    chosen = {title: arm for key, (title, *arm) in arms.items() if not ARMS or key in ARMS}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for seed in SEEDS:
        for name, arm in chosen.items():
            results[name].append(_measure(arm, root, weights, seed))
            print(f"  seed {seed}  {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    print(f"{machine()}; n = {len(SEEDS)}; median (range)\n")
    head = ["arm", "test accuracy", "macro F1", "training s", "whole command s", "CPU s"]
    rows = [
        [
            name,
            *(spread([run[key] for run in runs], 3) for key in ("acc", "macro_f1")),
            *(spread([run[key] for run in runs]) for key in ("fit_s", "process_s", "cpu_s")),
        ]
        for name, runs in results.items()
    ]
    print_table(head, rows)


def _measure(arm: list, root: str, weights: str, seed: int) -> dict[str, Any]:
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
