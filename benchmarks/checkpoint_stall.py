"""What a training step notices of a large checkpoint on its way to S3, and of Lightning's own."""

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.table import machine, print_table, run_json, spread
from lightship.checkpoint.policy import CheckpointPolicy
from lightship.checkpoint.store import CheckpointStore
from lightship.distributed.signals import StopRequest
from lightship.tracking.metrics_csv import MetricsCSV
from lightship.training.callbacks.checkpointing import Checkpointing
from tests.support.s3 import S3Server

RUNS = int(os.environ.get("RUNS", "3"))
SIZE_MB = int(os.environ.get("SIZE_MB", "500"))
STEP_S = 0.02
STEPS, SAVE_AT = 1000, 500
ARMS = {
    "no saving": "none",
    "lightship": "lightship",
    "Lightning, ModelCheckpoint": "model_checkpoint",
    "Lightning, AsyncCheckpointIO": "async",
}


def main() -> None:
    """step times around one save of a 500 MB checkpoint to S3 (SeaweedFS on this machine)"""
    results: dict[str, list[dict]] = {name: [] for name in ARMS}
    for run in range(RUNS):
        for name, arm in ARMS.items():
            with S3Server() as s3:  # a new one each time: it holds no more than a few saves
                os.environ.update(s3.env)
                result = run_json("benchmarks.checkpoint_stall", arm, s3.url("stall"))
            results[name].append(result)
            print(f"  run {run + 1}/{RUNS}  {name}: {result}", file=sys.stderr)
    waits = f"{SIZE_MB} MB, {STEP_S * 1000:.0f} ms of waiting a step"
    print(f"{machine()}; {waits}; n = {RUNS}; median (range)\n")
    head = ["arm", "median step ms", "p99 ms", "longest step ms", "all stalls s", "durable after s"]
    rows = []
    for name, runs in results.items():
        columns = [[run[key] for run in runs] for key in runs[0] if key != "process_s"]
        shown = [spread(column, 1 if column[0] < 100 else 0) for column in columns[:4]]
        rows.append([name, *shown, spread(columns[4], 1) if columns[4][0] else ""])
    copy_s = _copy_s()
    print_table(head, rows)
    print(f"\nthe limit, one copy of {SIZE_MB} MB in memory: {copy_s * 1000:.0f} ms")


def _copy_s() -> float:
    parts = _Heavy().weights
    began_s = time.perf_counter()
    copies = [part.clone() for part in parts]
    spent_s = time.perf_counter() - began_s
    assert len(copies) == len(parts)
    return spent_s


class _Heavy(LightningModule):
    """A checkpoint of SIZE_MB, and a step that keeps neither core busy, as on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        parts = [torch.randn(2**20) for _ in range(SIZE_MB * 10**6 // 2**22)]
        self.weights = nn.ParameterList(nn.Parameter(part, requires_grad=False) for part in parts)
        self.small = nn.Linear(64, 8)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        time.sleep(STEP_S)
        return self.small(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.small.parameters(), 0.01)


class _Clock(Callback):
    """When each step ended, all callbacks before and after it included."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.times_s.append(time.perf_counter())


def measure(arm: str, url: str) -> dict[str, float]:
    """Train STEPS steps with one save at SAVE_AT; the times of the steps, and of the save."""
    clock, plugins = _Clock(), []
    callbacks: list[Callback] = [clock]
    durable_at_s: list[float] = []
    if arm == "lightship":
        store = CheckpointStore(url)
        store.open_attempt()
        retain = store._retain

        def committed(*args: Any) -> None:
            durable_at_s.append(time.perf_counter())
            retain(*args)

        bound = CheckpointPolicy(2 * SAVE_AT, None)
        store._retain = committed  # type: ignore[method-assign]
        callbacks.append(Checkpointing(store, {}, StopRequest(), MetricsCSV(url), None, bound))
        plugins = [store]
    elif arm != "none":
        callbacks.append(
            ModelCheckpoint(
                url, every_n_train_steps=SAVE_AT, save_top_k=-1, save_on_train_epoch_end=False
            )
        )
        plugins = [AsyncCheckpointIO()] if arm == "async" else []
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=callbacks,
        plugins=plugins,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=arm != "none",
        default_root_dir=Path.cwd(),
    )
    batches: Any = [torch.randn(32, 64)] * STEPS
    trainer.fit(_Heavy(), DataLoader(batches, batch_size=None))
    ends_s = clock.times_s[SAVE_AT // 2 : STEPS - 1]  # not the first steps, nor the end's save
    steps_ms = torch.tensor([1000 * (b - a) for a, b in itertools.pairwise(ends_s)])
    median_ms = float(steps_ms.median())
    return {
        "median_ms": median_ms,
        "p99_ms": float(steps_ms.quantile(0.99)),
        "longest_ms": float(steps_ms.max()),
        "stalls_s": float((steps_ms - median_ms).clamp(min=0).sum()) / 1000,
        "durable_s": durable_at_s[0] - clock.times_s[SAVE_AT - 1] if durable_at_s else 0.0,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(*sys.argv[1:])))
