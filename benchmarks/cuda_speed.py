"""Part `speed`: cifar10-speed beside airbench94_muon's own script, on the same images."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks import cuda_data, one_fit
from benchmarks.cuda_part import LIMIT, Job
from benchmarks.speed_airbench import outcome, write_images
from benchmarks.table import run_json

EPOCHS, STEPS, BATCH = 8, 200, 2000
_PEER_SHARE, _SEEDS = 0.7, 3
"""airbench compiles for a minute before its first run; of the time that is left then."""


def rows(job: Job) -> Iterator[dict[str, Any]]:
    """Accuracy, training time by airbench's clock, and whole commands."""
    root = cuda_data.cifar10(job.data, job.folder, job.is_toy)
    if root is None:
        yield {"arm": "", "note": f"not run: no {cuda_data.CIFAR10} (make cuda-data)"}
        return
    yield lightship(job, root, 0, in_process=False)
    yield airbench(job, root)
    runs = [lightship(job, root, seed) for seed in range(1, 1 if job.is_toy else _SEEDS)]
    if runs:
        yield joined(runs, "lightship fit, more seeds")
    yield bare(job, root)
    if not job.is_toy:
        compiled = [lightship(job, root, seed, "max-autotune") for seed in range(2)]
        yield joined(compiled[1:], "lightship fit, compiled (second run)")


def lightship(
    job: Job, root: str, seed: int, compile: str = "none", in_process: bool = True
) -> dict[str, Any]:
    """A fit; with the seconds of the whole command if it has a process of its own."""
    batch, steps = (8, 3) if job.is_toy else (BATCH, STEPS)
    flags = [
        "--config=cifar10-speed", f"--data.root={root}", f"--run.seed={seed}",
        f"--data.global_batch_size={batch}", f"--trainer.max_steps={steps}",
        f"--optim.final_lr_fraction={1 / steps}",  # airbench's last rate
        f"--model.compile={compile}", "--run.tracking=offline", *job.accelerator,
    ]  # fmt: skip
    output = f"{job.folder}/speed-{compile}-{seed}"
    run = (
        one_fit.measure(output, flags) if in_process else run_json(one_fit.__name__, output, *flags)
    )
    train_s = run["init_s"] + run["step_s"] * steps
    found = {"arm": "lightship fit", "images_per_s": [batch * steps / train_s]}
    found |= {"accuracy": [run["test/acc"]], "training_s": [train_s]}
    return found | ({} if in_process else {"command_s": [run["process_s"]]})


def joined(runs: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    """One row of several runs."""
    keys = ("images_per_s", "accuracy", "training_s")
    return {"arm": arm, **{key: [run[key][0] for run in runs] for key in keys}}


def airbench(job: Job, root: str) -> dict[str, Any]:
    """The script as it is, ended when its time is over; the runs that it had finished."""
    arm, script = "airbench94_muon, unmodified", f"{job.data}/{cuda_data.AIRBENCH}"
    if not os.path.exists(script):
        return {"arm": arm, "note": f"not run: no {cuda_data.AIRBENCH} (make cuda-data)"}
    folder = f"{job.folder}/airbench"
    write_images(root, folder)
    said = f"{folder}/said"
    with open(said, "w+") as out:
        process = subprocess.Popen(
            [sys.executable, "-u", script], cwd=folder, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            process.wait(timeout=job.left_s * _PEER_SHARE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        out.seek(0)
        text = out.read()
    found = outcome(text)
    if not found["seconds"]:
        last = text.strip().splitlines()[-1:] or ["it printed nothing"]
        return {"arm": arm, "note": f"no run finished: {last[0][:150]}"}
    rates = [EPOCHS * 50_000 / second for second in found["seconds"]]
    note = f"accuracy {found['test/acc']:.4f} ± {found['std']:.4f}; compiled (max-autotune)"
    return {"arm": arm, "images_per_s": rates, "accuracy": found["accuracies"],
            "training_s": found["seconds"], "note": note}  # fmt: skip


def bare(job: Job, root: str) -> dict[str, Any]:
    """The limit of lightship's eager arms: a plain loop over its own batches and optimizer."""
    from benchmarks import speed_bare  # reads BATCH, which is another part's too

    speed_bare.BATCH = 4 if job.is_toy else BATCH
    steps = 2 if job.is_toy else STEPS
    run = speed_bare.measure(root, steps, bf16=True)
    return {"arm": "bare loop, bf16 (limit)", LIMIT: True, "training_s": [run["train_s"]],
            "images_per_s": [run["images"] / run["train_s"]]}  # fmt: skip
