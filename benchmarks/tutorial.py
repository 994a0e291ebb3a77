"""The tutorial as written, beside lightship's recipes `tutorial`, `cifar10` and `cifar10-speed`."""

import os
import sys
import tempfile

from benchmarks.table import machine, print_table, run_json, spread

EPOCHS = 2
RUNS = int(os.environ.get("RUNS", "1"))


def main() -> None:
    """the tutorial's job on real CIFAR-10: as written, and by lightship (RUNS=n for n runs)"""
    root = os.environ.get("CIFAR10")
    if not root:
        print("not run: set CIFAR10 to a folder with train/CLASS/IMAGE and test/CLASS/IMAGE")
        return
    arms = {
        "tutorial as written, Lightning": lambda seed, out: run_json(
            "benchmarks.tutorial_as_written", root, str(seed), str(EPOCHS), out
        ),
        "lightship --config tutorial": lambda seed, out: _lightship(
            out, root, seed, 32, "--config", "tutorial", f"--trainer.max_epochs={EPOCHS}"
        ),
        "lightship --config cifar10, 70 steps": lambda seed, out: _lightship(
            out, root, seed, 256, "--config", "cifar10", "--trainer.max_steps=70"
        ),
        "lightship --config cifar10, 1 epoch": lambda seed, out: _lightship(
            out, root, seed, 256, "--config", "cifar10", "--trainer.max_epochs=1"
        ),
        "lightship --config cifar10-speed, 24 steps of 128": lambda seed, out: _lightship(
            out,
            root,
            seed,
            128,
            "--config",
            "cifar10-speed",
            "--trainer.max_steps=24",
            # The recipe's, for this batch.
            "--data.global_batch_size=128",
            "--optim.sgd_lr=6.8",
            "--optim.head_lr=86",
            "--optim.weight_decay=0.000256",
        ),
        "bare loop, batch 32 (limit)": lambda seed, out: _bare(32, "0", "0", 4_096),
        "bare loop, batch 256 NHWC bf16 (limit)": lambda seed, out: _bare(256, "1", "1", 32_768),
    }
    results: dict[str, list[dict]] = {name: [] for name in arms}
    for seed in range(RUNS):
        for name, measure in arms.items():
            with tempfile.TemporaryDirectory() as out:
                results[name].append(measure(seed, out))
            print(f"  run {seed + 1}/{RUNS}  {name}: {results[name][-1]}", file=sys.stderr)
    print(f"{machine()}; {EPOCHS} epochs; n = {RUNS}; median (range)\n")
    head = ["arm", "images/s", "training s", "whole command s", "test accuracy"]
    rows = []
    for name, runs in results.items():
        accuracies = [run["test/acc"] for run in runs if "test/acc" in run]
        rows.append([
            name,
            spread([run["images"] / run["fit_s"] for run in runs]),
            spread([run["fit_s"] for run in runs], 1),
            spread([run["process_s"] for run in runs], 1) if accuracies else "",
            spread(accuracies, 3) if accuracies else "",
        ])  # fmt: skip
    print_table(head, rows)


def _lightship(out: str, root: str, seed: int, batch: int, *flags: str) -> dict:
    more = [f"--data.root={root}", f"--run.seed={seed}", "--run.tracking=offline"]
    result = run_json("benchmarks.one_fit", f"{out}/run", *flags, *more)
    return {**result, "images": result["steps"] * batch}


def _bare(batch: int, channels_last: str, bf16: str, images: int) -> dict:
    flags = [str(batch), channels_last, bf16, str(images)]
    return run_json("benchmarks.bare_loop", *flags)
