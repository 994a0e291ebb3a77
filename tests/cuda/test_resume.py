"""kill -9 and the same command again: with `deterministic` the weights are the same, bit by bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.fits import command
from tests.support.runs import differences, last_state

FLAGS = [
    "--config=digits", "--model.net=tests.cuda.nets:convolutions", "--optim.name=adamw",
    "--data.flip=true", "--data.crop_padding_px=2", "--model.ema_decay=0.9",
    "--trainer.max_epochs=2", "--trainer.limit_train_batches=12", "--trainer.log_every_n_steps=5",
    "--trainer.deterministic=true", "--run.checkpoint_every_steps=6",
]  # fmt: skip


def start(output: Path, step: int, *flags: str) -> subprocess.Popen[str]:
    arguments = command("fit", output, *FLAGS, *flags)
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cuda.killed", str(step), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str], code: int) -> str:
    _, said = process.communicate(timeout=500)
    assert process.returncode == code, said
    return said


@pytest.mark.timeout(600)  # three processes, on a busy machine too
@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_killed_and_resumed_is_as_if_never_killed(precision: str, tmp_path: Path) -> None:
    flags = [f"--trainer.precision={precision}"]
    whole, killed = (
        start(tmp_path / "whole", 0, *flags),
        start(tmp_path / "killed", 17, *flags),
    )
    end(killed, -signal.SIGKILL)
    said = end(start(tmp_path / "killed", 0, *flags), 0)
    assert "resum" in said.lower(), said
    end(whole, 0)
    states = [last_state(str(tmp_path / name)) for name in ("whole", "killed")]
    assert differences(*states) == []
