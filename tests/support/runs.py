"""What a run has left, and whether two runs have come to the same."""

import csv
import io
import json
from typing import Any

import torch

from lightship import storage
from lightship.checkpoint.store import CheckpointStore
from tests.support.images import little_set, put

STEPS_PER_EPOCH = 4
_TIMES = ("time_s", "throughput/")


def flags_of_little_run(root: str, *more: str) -> list[str]:
    """A fit of 3 epochs of 4 steps of `little_images`, all of whose parts a restart could break."""
    return [
        "fit", f"--data.root={root}", "--run.tracking=none",
        "--model.net=tests.support.own_nets:moody",
        "--data.global_batch_size=6", "--data.flip=true", "--optim.name=adamw", "--optim.lr=0.01",
        "--optim.schedule=cosine", "--trainer.max_epochs=3", "--trainer.log_every_n_steps=3",
        "--run.log_images=2", *more,
    ]  # fmt: skip


def little_images(url: str, val: bool = True) -> str:
    splits = ("train", "val", "test") if val else ("train", "test")
    files = little_set(splits, per_class=8)
    return put(url, files)


def last_state(output: str) -> dict[str, Any]:
    """All of a run's newest checkpoint, its DONE and its metrics, without times and names."""
    store = CheckpointStore(f"{output}/checkpoints")
    newest = store.newest()
    assert newest is not None
    state = store.load_checkpoint(store.url_of(newest))
    # Counts the beginnings of the last validation, for nobody.
    del state["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    state["lightship"] = {**state["lightship"], "metrics": ()}
    table = csv.DictReader(io.StringIO(storage.read_bytes(f"{output}/logs/metrics.csv").decode()))
    state["metrics.csv"] = [
        {name: value for name, value in row.items() if not name.startswith(_TIMES)} for row in table
    ]
    state["DONE"] = json.loads(storage.read_bytes(f"{output}/DONE"))
    return state


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two states are not bit for bit the same."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{at}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [d for key in one for d in differences(one[key], other[key], f"{at}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return [f"{at}: {len(one)} items, {len(other)}"]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for index, (a, b) in pairs for d in differences(a, b, f"{at}[{index}]")]
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        same = type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other)
    else:
        same = one == other or (one != one and other != other)
    return [] if same else [f"{at}: {one} != {other}"]
