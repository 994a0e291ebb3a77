"""What a stack adds to a training step, beside a bare loop over the same net and batches.

All arms take turns in one process. The net keeps the clock: it notes when it is called and done. So
what a stack adds is seen apart from the net's own time, which is the same work in each arm and yet
varies by more, from one minute to the next, than what is measured.
"""

import contextlib
import io
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from benchmarks.table import machine, print_table, spread
from lightship import cli
from lightship.commands import fit
from lightship.data.augment import Augment
from lightship.data.batch import Batch
from lightship.data.order import Shuffle
from lightship.data.resident import ResidentSplit, ResidentTrainLoader
from lightship.data.shares import TrainShare
from tests.support.images import little_set, put
from tests.support.step_profiler import StepProfiler

ROUNDS = int(os.environ.get("RUNS", "5"))
STEPS = int(os.environ.get("STEPS", "400"))
WARM_UP = 100
BATCH = 4
SIZE_PX = 32
CLASSES = tuple("abcdefghij")
CLOCK = time.thread_time if os.environ.get("CLOCK") == "cpu" else time.perf_counter
WORK_MS = float(os.environ.get("WORK_MS", "5"))
DEVICE = torch.device(os.environ.get("DEVICE", "cpu"))
ACCELERATOR = "gpu" if DEVICE.type == "cuda" else "cpu"


class Clocked(nn.Module):
    """A linear layer on pooled pixels; `work` matrix products of 256 on top of it."""

    times: list[float] = []  # noqa: RUF012 - when called, of whichever arm is running
    ended: list[float] = []  # noqa: RUF012 - and when done
    work = 0

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)
        self.register_buffer("matrix", torch.eye(256), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        is_step = self.training and torch.is_grad_enabled()  # not the check before training
        if is_step:
            self.times.append(CLOCK())
        with torch.no_grad():
            matrix = self.matrix
            for _ in range(self.work):
                matrix = matrix @ self.matrix
        logits = self.head(images.mean((2, 3)) + matrix[0, 1])
        if is_step:
            self.ended.append(CLOCK())
        return logits


def build(num_classes: int) -> Clocked:
    """The net, for `--model.net`."""
    return Clocked(num_classes)


def products_of(milliseconds: float) -> int:
    """How many matrix products take so long here."""
    matrix, taken_s = torch.eye(256), []
    for _ in range(20):
        began_s = time.perf_counter()
        for _ in range(50):
            matrix = matrix @ matrix
        taken_s.append((time.perf_counter() - began_s) / 50)
    return max(1, round(milliseconds / 1000 / min(taken_s)))


class Plain(LightningModule):
    """The least a LightningModule can be."""

    def __init__(self, with_metric: bool) -> None:
        super().__init__()
        self.net, self.with_metric = Clocked(len(CLASSES)), with_metric

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(normalised(batch.images)), batch.labels)
        if self.with_metric:
            self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        return optimizer_and_schedule(self.net)


def normalised(images: Tensor) -> Tensor:
    return images.float() / 255 - 0.5


def optimizer_and_schedule(net: nn.Module) -> dict:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10**6)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Batches:
    """Lightship's own resident batches for the arms without lightship."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (1600, SIZE_PX, SIZE_PX, 3)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        split = ResidentSplit(pixels.to(DEVICE), (torch.arange(1600) % 10).to(DEVICE))
        self.done = 0
        order = TrainShare(Shuffle(1600, BATCH, 0), 0, 1, 1)
        self.loader = ResidentTrainLoader(split, order, Augment(0), self._position)

    def _position(self) -> tuple[int, int]:
        self.done += 1
        return divmod(self.done - 1, len(self.loader))

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)


def bare(steps: int, out: str, watch: Callback | None) -> None:
    """The loop as one would write it."""
    net = Clocked(len(CLASSES)).to(DEVICE)
    parts = optimizer_and_schedule(net)
    optimizer, schedule = parts["optimizer"], parts["lr_scheduler"]["scheduler"]
    batches = iter(Batches())
    for _ in range(steps):
        batch = next(batches)
        loss = F.cross_entropy(net(normalised(batch.images)), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def barebones(steps: int, out: str, watch: Callback | None) -> None:
    """Lightning with all its features off."""
    trainer = Trainer(barebones=True, max_steps=steps, accelerator=ACCELERATOR, devices=1)
    trainer.fit(Plain(with_metric=False), Batches())


def default(steps: int, out: str, watch: Callback | None) -> None:
    """Lightning as it comes: progress bar with one metric, CSV logger, checkpoints."""
    callbacks = [watch] if watch else []
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            max_steps=steps, accelerator=ACCELERATOR, devices=1, logger=CSVLogger(out),
            default_root_dir=out, callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(Plain(with_metric=True), Batches())


def lightship(steps: int, out: str, watch: Callback | None) -> None:
    """A whole `lightship fit`: callbacks, checkpoints, tracking offline."""
    build_trainer = fit.build_trainer

    def watched(config, callbacks, *more):
        return build_trainer(config, [*([watch] if watch else []), *callbacks], *more)

    fit.build_trainer = watched
    try:
        code = cli.main([
            "fit", f"--data.root={_images()}", f"--run.output={out}/run",
            "--model.net=benchmarks.step_overhead:build", "--optim.name=sgd",
            "--optim.schedule=linear", f"--data.global_batch_size={BATCH}", "--data.val_fraction=0",
            f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1",
            f"--trainer.accelerator={ACCELERATOR}", "--trainer.devices=1",
            f"--run.tracking={os.environ.get('TRACKING', 'offline')}", "--run.log_images=0",
        ])  # fmt: skip
    finally:
        fit.build_trainer = build_trainer
    assert code == 0


def _images() -> str:
    """1,600 images as class folders, once."""
    folder = Path(tempfile.gettempdir()) / "lightship-step-overhead"
    if not folder.exists():
        files = little_set(("train",), per_class=160, classes=CLASSES, size_px=(SIZE_PX, SIZE_PX))
        put(str(folder), files)
    return str(folder)


ARMS: dict[str, Callable[[int, str, Callback | None], None]] = {
    "bare loop": bare,
    "Lightning barebones": barebones,
    "Lightning default, one metric and bar": default,
    "lightship fit": lightship,
}


class Step(NamedTuple):
    """Milliseconds of a step, and those of them in the net."""

    whole: float
    net: float


def measure(arm: Callable[[int, str, Callback | None], None]) -> Step:
    """The mean step of an arm, over all but the first ones."""
    Clocked.times.clear()
    Clocked.ended.clear()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stderr(io.StringIO()):
        arm(WARM_UP + STEPS + 1, out, None)
    times, ended = (np.array(clock[WARM_UP:]) for clock in (Clocked.times, Clocked.ended))
    whole, net = np.diff(times).mean(), (ended - times)[:-1].mean()
    return Step(1000 * float(whole), 1000 * float(net))


def syncs(arm: Callable[[int, str, Callback | None], None]) -> str:
    """Waits for the device a step, as far as they can be counted in this arm."""
    if arm in (bare, barebones):  # the first has no hooks, the second takes no callbacks
        return ""
    watch = StepProfiler(60, 80)  # steps in which no log point is due
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stderr(io.StringIO()):
        arm(100, out, watch)
    return f"{sum(watch.syncs.values()) / 20:g}"


def quiet_process() -> None:
    """No warnings, and one thread: what is measured is one's, and threads wait for each other."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)


def take_turns(names: list[str]) -> dict[str, list[Step]]:
    """The steps of these arms, interleaved."""
    taken: dict[str, list[Step]] = {name: [] for name in names}
    for round_ in range(ROUNDS):
        for name in names:
            taken[name].append(measure(ARMS[name]))
            told = f"  round {round_ + 1}/{ROUNDS}  {name}: {taken[name][-1]}"
            print(told, file=sys.stderr, flush=True)
    return taken


def whole_steps() -> Iterator[tuple[str, list[Step], str]]:
    """Each arm's steps without work in the net, and its waits for the device a step."""
    quiet_process()
    waits = {name: syncs(arm) for name, arm in ARMS.items()}
    for name, steps in take_turns(list(ARMS)).items():
        yield name, steps, waits[name]


def main() -> None:
    """what each stack adds to a step: with no work at all, and beside a step of 5 ms (CPU)"""
    quiet_process()
    names = os.environ["ARMS"].split(",") if "ARMS" in os.environ else list(ARMS)
    waits = {name: syncs(ARMS[name]) for name in names}
    rows = []
    for work_ms in (0.0, WORK_MS):
        Clocked.work = products_of(work_ms) if work_ms else 0
        taken = take_turns(names)
        net_ms = statistics.median(step.net for steps in taken.values() for step in steps)
        outside = {name: [one.whole - one.net for one in steps] for name, steps in taken.items()}
        bare_ms = outside["bare loop"]
        for name in names:
            pairs = list(zip(outside[name], bare_ms, strict=True))
            whole = zip(taken[name], taken["bare loop"], strict=True)
            rows.append([
                f"{name}, {work_ms:g} ms" if work_ms else name,
                spread([step.whole for step in taken[name]], 3),
                spread([one - base for one, base in pairs], 3),
                spread([(net_ms + base) / (net_ms + one) for one, base in pairs], 3),
                spread([base.whole / one.whole for one, base in whole], 3),
                waits[name],
            ])  # fmt: skip
    print(f"{machine()}; {STEPS} steps; n = {ROUNDS}; median (range)\n")
    head = ["arm", "ms a step", "added ms", "of the bare rate", "as timed whole", "syncs a step"]
    print_table(head, rows)
