"""The ordinary entry on XLA: what it trains, how often it compiles, and that it survives."""

import csv
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightship.data.augment import Augment
from lightship.data.batch import Batch
from tests.support.images import put, real_cifar10
from tests.support.runs import differences, last_state

pytest.importorskip("torch_xla", reason="torch_xla is not installed: make test-xla installs it")

SHORT = ["--trainer.max_epochs=3", "--trainer.limit_train_batches=10", "--data.eval_batch_size=64"]
CHIPS = 4
UNDISTURBED = pytest.mark.xdist_group("undisturbed")
"""Tests that share a run: one worker does them all."""


def start(trace: Path, *flags: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.xla.traced", str(trace), "fit", "--run.tracking=none"]
    return subprocess.Popen(
        [*command, *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PJRT_DEVICE": "CPU", **env},
    )


def fit(output: Path, *flags: str, code: int = 0, **env: str) -> str:
    """Run to the end; its standard error. A trace lies beside the output."""
    output.parent.mkdir(parents=True, exist_ok=True)
    process = start(output.with_suffix(".trace"), f"--run.output={output}", *flags, **env)
    _, told = process.communicate(timeout=250)
    assert process.returncode == code, told
    return told


def losses(output: Path) -> list[float]:
    with (output / "logs" / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def results(output: Path) -> dict[str, float]:
    return json.loads((output / "DONE").read_text())


def trace(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.with_suffix(".trace").read_text().splitlines()]


# In fp32 all through: Muon iterates in bfloat16, and Adam's first steps make much of last bits.
SETS = {
    "digits": [
        "--config=digits", "--optim.name=adamw", "--optim.lr=0.0002", "--optim.warmup_fraction=0",
    ],
    "cifar10": [
        "--data.global_batch_size=50", "--data.crop_padding_px=4", "--data.flip=true",
        "--data.cutout_px=6", "--data.mixup_alpha=0.2", "--model.channels_last=true",
        "--optim.name=adamw", "--optim.lr=0.0002", "--optim.weight_decay=0.05",
        "--optim.schedule=cosine", "--trainer.gradient_clip_val=1",
    ],
    "sgd": [
        "--config=digits", "--optim.name=sgd", "--optim.lr=0.1", "--optim.warmup_fraction=0",
        "--data.cutmix_alpha=1", "--trainer.accumulate_grad_batches=2",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> str:
    return put(str(tmp_path_factory.mktemp("cifar")), real_cifar10(train=60, test=20))


@pytest.mark.parametrize("name", SETS)
def test_the_same_curve_as_eager(name: str, cifar: str, tmp_path: Path) -> None:
    flags = [*SETS[name], *SHORT, "--trainer.log_every_n_steps=1"]
    if name == "cifar10":
        flags.append(f"--data.root={cifar}")
    for accelerator in ("cpu", "tpu"):
        fit(tmp_path / accelerator, *flags, f"--trainer.accelerator={accelerator}")
    eager, xla = losses(tmp_path / "cpu"), losses(tmp_path / "tpu")
    assert len(eager) == len(xla) == 30
    apart = [abs(a - b) for a, b in zip(eager, xla, strict=True)]
    print(f"{name}: losses of 20 steps differ by {max(apart[:20]):.1e} at most")
    assert max(apart[:20]) < 1e-3, apart
    assert max(eager) - min(eager) > 0.02, "they have to move for their distance to tell anything"


@pytest.mark.parametrize(("name", "least"), [("digits", 0.95), ("cifar10", 0.3)])
def test_learns_as_much_as_eager(name: str, least: float, tmp_path: Path) -> None:
    flags = ["--config=digits", "--trainer.max_epochs=4"]
    if name == "cifar10":
        images = put(str(tmp_path / "images"), real_cifar10(train=300, test=50))
        flags = [f"--data.root={images}", "--data.flip=true", "--data.crop_padding_px=4"]
        flags += ["--optim.lr=0.001", "--trainer.max_epochs=4"]
    for accelerator in ("cpu", "tpu"):
        fit(tmp_path / accelerator, *flags, f"--trainer.accelerator={accelerator}")
    one, other = results(tmp_path / "cpu"), results(tmp_path / "tpu")
    print(f"{name}: test accuracy {one['test/acc']:.4f} eager, {other['test/acc']:.4f} on XLA")
    assert one["test/num_samples"] == other["test/num_samples"]
    assert min(one["test/acc"], other["test/acc"]) >= least
    # Two standard deviations of the difference of two shares of so many images.
    noise = 2 * math.sqrt(2 * one["test/acc"] * (1 - one["test/acc"]) / one["test/num_samples"])
    assert abs(one["test/acc"] - other["test/acc"]) <= noise


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--optim.name=adamw", "--trainer.gradient_clip_val=1", "--trainer.precision=bf16-mixed"],
        ["--optim.name=sgd", "--data.mixup_alpha=0.2", "--trainer.accumulate_grad_batches=2"],
    ],
    ids=["muon-ema", "adamw-clip-bf16", "sgd-mixup-parts"],
)
def test_compiles_once_and_a_quiet_step_fetches_nothing(more: list[str], tmp_path: Path) -> None:
    fit(
        tmp_path / "run", "--config=digits", *SHORT, *more, "--trainer.accelerator=tpu",
        "--trainer.log_every_n_steps=5", "--run.log_images=4", "--data.crop_padding_px=2",
    )  # fmt: skip
    rows = [row for row in trace(tmp_path / "run") if row["kind"] != "test"]
    parts = 2 if "--trainer.accumulate_grad_batches=2" in more else 1
    train = [row for row in rows if row["kind"] == "train"]
    assert len(train) == 30 * parts
    print(f"{'after':16}{'compiled':>9}{'fetched':>9}{'fallbacks':>11}{'sent':>6}")
    for row in rows:
        print(
            f"{row['kind'] + ' ' + str(row['step']):16}{row['compiled']:9}{row['fetched']:9}"
            f"{row['fallbacks']:11}{row['sent']:6}"
        )
    # Two steps, then nothing in that epoch; its validation; two steps of the next; then nothing.
    assert train[2 * parts - 1]["compiled"] == train[10 * parts - 1]["compiled"]
    assert train[12 * parts - 1]["compiled"] == rows[-1]["compiled"]
    quiet = 0
    for before, after in itertools.pairwise(train):
        same_epoch = (before["step"] - 1) // 10 == (after["step"] - 1) // 10
        if same_epoch and after["step"] % 5 and before["step"] % 5:
            quiet += 1
            assert after["fetched"] == before["fetched"], after
            assert after["fallbacks"] == before["fallbacks"], after
    assert quiet >= 15
    # Not in every step the weights again: a row of ids, the step's numbers, a seed.
    assert train[-2]["sent"] - train[-3]["sent"] <= 6


@pytest.mark.parametrize(
    "kind", ["crop_padding_px=3", "flip=1", "cutout_px=6", "mixup_alpha=0.2", "cutmix_alpha=1"]
)
def test_the_same_augmentation(kind: str) -> None:
    name, _, value = kind.partition("=")
    augment = Augment(seed=3, **{name: type(getattr(Augment, name))(float(value))})
    pixels = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    ids, labels = torch.arange(64) * 7919, torch.arange(64) % 10
    here = augment(Batch(pixels, labels, ids), epoch=5)
    there = augment(Batch(*(part.to("xla") for part in (pixels, labels, ids))), epoch=5)
    assert not torch.equal(here.images, pixels)
    for one, other in zip(here, there, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other.cpu(), atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    fit(output, *LITTLE)
    return output


LITTLE = ["--config=digits", *SHORT, "--trainer.accelerator=tpu", "--trainer.log_every_n_steps=5"]
LITTLE += ["--run.checkpoint_every_steps=4", "--run.log_images=2"]


@UNDISTURBED
@pytest.mark.parametrize("step", [7, 20])
def test_killed_and_resumed_as_if_never(step: int, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    fit(output, *LITTLE, code=-signal.SIGKILL, LIGHTSHIP_TEST_KILL_AT_STEP=str(step))
    told = fit(output, *LITTLE)
    assert ", from step " in told
    assert differences(last_state(str(undisturbed)), last_state(str(output))) == []


@pytest.mark.parametrize(("first", "then"), [("tpu", "cpu"), ("cpu", "tpu")])
def test_goes_on_on_another_device(first: str, then: str, tmp_path: Path) -> None:
    flags = ["--config=digits", *SHORT, "--run.checkpoint_every_steps=4", "--optim.lr=0.0002"]
    flags += ["--optim.name=adamw", "--trainer.log_every_n_steps=1"]
    fit(tmp_path / "whole", *flags, f"--trainer.accelerator={then}")
    fit(
        tmp_path / "run", *flags, f"--trainer.accelerator={first}", code=-signal.SIGKILL,
        LIGHTSHIP_TEST_KILL_AT_STEP="12",
    )  # fmt: skip
    fit(tmp_path / "run", *flags, f"--trainer.accelerator={then}")
    whole, run = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert len(whole) == len(run) == 30
    assert max(abs(a - b) for a, b in zip(whole, run, strict=True)) < 1e-3


@UNDISTURBED
def test_asked_to_stop(undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start(tmp_path / "run.trace", f"--run.output={output}", *LITTLE)
    until = time.monotonic() + 120
    while not (tmp_path / "run.trace").exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 143, told
    fit(output, *LITTLE)
    assert differences(last_state(str(undisturbed)), last_state(str(output))) == []


@UNDISTURBED
def test_streamed_as_from_memory(undisturbed: Path, tmp_path: Path) -> None:
    fit(tmp_path / "run", *LITTLE, "--data.mode=streaming")
    one, other = last_state(str(undisturbed)), last_state(str(tmp_path / "run"))
    assert differences(one["state_dict"], other["state_dict"]) == []


def test_several_chips_come_to_what_one_does(tmp_path: Path) -> None:
    """One process drives them; the compiler spreads the batch and sums over them (GSPMD)."""
    flags = [*LITTLE, "--optim.name=sgd", "--optim.lr=0.02"]
    fit(tmp_path / "one", *flags)
    fit(tmp_path / "run", *flags, CPU_NUM_DEVICES=str(CHIPS))
    one, other = losses(tmp_path / "one"), losses(tmp_path / "run")
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 1e-3, (one, other)
    print(f"losses on 1 and {CHIPS} devices: {one} {other}")
    before, after = results(tmp_path / "one"), results(tmp_path / "run")
    assert before["test/num_samples"] == after["test/num_samples"] == 360
    assert abs(before["test/acc"] - after["test/acc"]) <= 0.01
    rows = [row for row in trace(tmp_path / "run") if row["kind"] == "train"]
    # Weights that were fetched, or put back by EMA, carry another note of how they are spread: the
    # step and the validation are compiled twice.
    assert rows[11]["compiled"] == rows[19]["compiled"]
    assert rows[20]["compiled"] == rows[-1]["compiled"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--trainer.precision=16-mixed"], "takes 32-true, bf16-mixed, bf16-true"),
        (["--model.compile=default"], "XLA compiles every step"),
        (["--trainer.devices=3"], f"has {CHIPS} XLA devices"),
        (["--data.global_batch_size=30"], "is not divisible by 4 "),
    ],
)
def test_what_cannot_be(flags: list[str], says: str, tmp_path: Path) -> None:
    told = fit(
        tmp_path / "run", "--config=digits", "--trainer.accelerator=tpu", *flags, code=78,
        CPU_NUM_DEVICES=str(CHIPS),
    )  # fmt: skip
    assert says in told


def test_hosts_that_are_no_slice(tmp_path: Path) -> None:
    """Two hosts meet by GKE's variables; the runtime, which here knows of one, is asked too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.1", "PET_MASTER_PORT": port}
    hosts = [
        start(
            tmp_path / f"{host}.trace", f"--run.output={tmp_path}/run", "--config=digits",
            "--trainer.accelerator=tpu", TPU_WORKER_ID=str(host), **env,
        )
        for host in range(2)
    ]  # fmt: skip
    for host in hosts:
        _, told = host.communicate(timeout=120)
        assert host.returncode == 78, told
        assert "the job has 2 hosts, but the XLA runtime sees 1" in told
