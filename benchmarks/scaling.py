"""Images a second on one and two processes of one thread each, beside plain PyTorch DDP."""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.bare_ddp import WARM_UP_STEPS
from benchmarks.table import machine, print_table, spread

RUNS = int(os.environ.get("RUNS", "3"))
STEPS = int(os.environ.get("STEPS", "60"))
BATCH = 64
_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def main() -> None:
    """weak scaling (64 images a process) and strong scaling (64 in all) of litcnn (RUNS=n)"""
    arms = {
        (kind, name, processes): (run, BATCH if kind == "weak" else BATCH // processes)
        for kind in ("weak", "strong")
        for processes in (1, 2)
        for name, run in (("lightship", lightship), ("plain DDP (limit)", plain_ddp))
        if not (kind == "strong" and processes == 1)  # is weak's
    }
    speeds: dict[tuple[str, str, int], list[float]] = {arm: [] for arm in arms}
    for _ in range(RUNS):
        for arm, (run, batch) in arms.items():
            speeds[arm].append(run(arm[2], batch))
    print(f"{machine()}; gloo, {STEPS} steps; n = {RUNS}; median (range)\n")
    rows = []
    for (kind, name, processes), found in speeds.items():
        alone = statistics.median(speeds["weak", name, 1])
        gain = statistics.median(found) / alone
        rows.append([kind, name, str(processes), spread(found), f"{gain:.2f}"])
    head = ["scaling", "arm", "processes", "images/s", "times one process"]
    print_table(head, sorted(rows, key=lambda row: (row[0] != "weak", row[1], row[2])))


def lightship(processes: int, batch: int) -> float:
    """Images a second of `lightship fit`, between its log points after the first."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            f"--run.output={folder}/run", "--run.tracking=none", "--data.root=digits",
            "--data.image_size_px=32", f"--data.global_batch_size={batch * processes}",
            f"--trainer.devices={processes}", "--trainer.accelerator=cpu",
            f"--trainer.max_steps={STEPS + WARM_UP_STEPS}", "--trainer.max_epochs=-1",
            "--trainer.check_val_every_n_epoch=1000", "--run.log_images=0",
            f"--trainer.log_every_n_steps={WARM_UP_STEPS}",
        ]  # fmt: skip
        command = [sys.executable, "-m", "lightship", "fit", *flags]
        environment = {**os.environ, **_ENVIRONMENT}
        subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=True)
        with Path(folder, "run", "logs", "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["throughput/images_per_s"]]
        found = [float(row["throughput/images_per_s"]) for row in rows[1:]]
        return statistics.harmonic_mean(found)


def plain_ddp(processes: int, batch: int) -> float:
    """Images a second of the plain loop."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "benchmarks.bare_ddp", str(batch), str(STEPS)]
    environment = {**os.environ, **_ENVIRONMENT}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["images_per_s"]
