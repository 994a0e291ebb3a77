"""doctor's rows of the device, where it is sound and where it is not."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from lightship import cli
from lightship.commands.base import Command
from lightship.doctor.checks import CHECKS
from lightship.doctor.context import Context
from lightship.doctor.runner import run
from tests.cuda.conftest import DEVICE
from tests.cuda.fits import ACCELERATOR

ROWS = ("GPU driver", "GPUs", "model memory")


def findings(*flags: str) -> dict[str, dict[str, str]]:
    """The rows of the device, without doctor's deadline: a machine may be slow to import torch."""
    parsed = cli.parse(["doctor", "--config=digits", "--run.tracking=none", *flags])
    assert isinstance(parsed, Command)
    context = Context(parsed.config, parsed.wrong, False, lambda: None)
    context.started_s += 100
    checks = [check for check in CHECKS if check.name in ROWS]
    return {check.name: asdict(finding) for check, finding in run(checks, context)}


def test_sound() -> None:
    found = findings(ACCELERATOR, "--trainer.devices=1")
    if DEVICE == "cuda":
        assert {row["status"] for row in found.values()} == {"ok"}, found
        assert torch.version.cuda in found["GPU driver"]["found"]
        assert torch.cuda.get_device_name() in found["GPUs"]["found"]
        assert "per GPU" in found["model memory"]["found"]
    else:
        assert found["GPUs"]["means"] == "training runs on the CPU"
        assert found["model memory"]["status"] == "ok", found
        assert "per node" in found["model memory"]["found"]


def test_more_processes_than_gpus() -> None:
    flags = ["--trainer.devices=99"] if DEVICE == "cuda" else ["--trainer.accelerator=gpu"]
    row = findings(*flags)["GPUs"]
    assert row["status"] == "fail"
    assert ("99" if DEVICE == "cuda" else "0 GPUs visible") in row["found"]


def test_a_gpu_that_is_hidden() -> None:
    """Of a process of its own: CUDA reads the variable once."""
    code = "import json; from tests.cuda.test_doctor import findings; "
    code += "print(json.dumps(findings('--trainer.accelerator=gpu')))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])["GPUs"]
    assert row["status"] == "fail"
    assert "docker run --gpus all" in row["fix"]


def test_a_batch_that_does_not_fit() -> None:
    """On a GPU its speed cannot be measured, and the row still says what is too large."""
    flags = ["--model.net=resnet18", "--data.image_size_px=224", "--data.global_batch_size=1048576"]
    row = findings(ACCELERATOR, "--trainer.devices=1", *flags)["model memory"]
    assert row["status"] == "fail", row
    assert "--trainer.accumulate_grad_batches 2 or more" in row["fix"]


@pytest.mark.only_cuda("tests/e2e/test_doctor_command.py runs the command on a CPU")
def test_the_command_ends_well(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightship", "doctor", "--config=digits", ACCELERATOR]
    command += ["--trainer.devices=1", "--run.tracking=none", f"--run.output={tmp_path}/run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert torch.cuda.get_device_name() in done.stdout
