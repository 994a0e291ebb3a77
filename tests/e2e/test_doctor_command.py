"""`lightship doctor` in real processes: its exit code, its last line, and that it always ends."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import warm

CHECKS = 19
FRESH = (sys.executable, "-m", "lightship")
BOUND_S = 100
"""Far above the doctor's own 30 s, for a busy machine; far below what a hang would take."""


def doctor(
    folder: Path, *flags: str, start: tuple[str, ...] | None = None, **env: str
) -> tuple[int, list[str]]:
    """Exit code and all lines, both streams in the order in which they came."""
    command = [*(start or (warm.executable(),)), "doctor", *flags]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "NETRC": str(folder / "no-netrc"), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BOUND_S,
    )
    return done.returncode, done.stdout.splitlines()


def answered(folder: Path, *flags: str, **how: Any) -> tuple[int, list[str]]:
    """As `doctor`, again where a row says that the machine was too busy to tell."""
    for _ in range(3):
        code, lines = doctor(folder, *flags, **how)
        if not any("still importing torch" in line or "no answer" in line for line in lines):
            break
    return code, lines


def statuses(lines: list[str]) -> list[str]:
    words = (line.split(" ")[0] for line in lines)
    return [word for word in words if word in ("ok", "warn", "fail", "skipped")]


def test_sound(tmp_path: Path) -> None:
    code, lines = answered(tmp_path, "--config", "digits", "--run.tracking=none")
    assert code == 0, lines
    assert len(statuses(lines)) == CHECKS
    assert set(statuses(lines)) <= {"ok", "warn", "skipped"}
    assert list(tmp_path.iterdir()) == [], "it left something"


def test_an_encoding_without_the_letters(tmp_path: Path) -> None:
    root = "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    flags = ("--run.tracking=none", f"--data.root={root}")
    code, lines = answered(tmp_path, *flags, start=FRESH, PYTHONIOENCODING="ascii")
    assert code == 78, lines
    assert len(statuses(lines)) == CHECKS
    assert any(r"caf\xe9" in line for line in lines)


def test_the_first_failure_is_the_last_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    flags = ("--run.tracking=none", "--data.root=nowhere", "--run.output=file/run")
    code, lines = answered(tmp_path, *flags)
    assert code == 78
    assert statuses(lines).count("fail") >= 2
    assert lines[-1].startswith("lightship: data: --data.root")
    assert "nowhere" in lines[-1]
    assert "fix: correct --data.root" in lines[-1]


def test_an_invalid_configuration_still_has_a_table(tmp_path: Path) -> None:
    code, lines = doctor(tmp_path, "--data.global_batch_size=0", "--run.log_format=json")
    assert code == 78
    error = json.loads(lines[-1])
    assert error["exit_code"] == 78
    assert error["text"].startswith("configuration: --data.global_batch_size is 0")
    rows = [json.loads(line) for line in lines[:-1]]
    assert len(rows) == CHECKS
    assert [row["status"] for row in rows if row["check"] == "configuration"] == ["fail"]
    skipped = [row["found"] for row in rows if row["check"] == "data"]
    assert skipped == ["the configuration is invalid"]


def test_under_torchrun_all_ranks_all_reduce_and_one_prints(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    start = (FRESH[0], *torchrun, *FRESH[1:])
    flags = ("--run.tracking=none", "--trainer.accelerator=cpu", "--run.output=run")
    code, lines = answered(tmp_path, *flags, start=start, OMP_NUM_THREADS="1")
    assert code == 0, lines
    assert sum("all-reduce OK (gloo, 2 ranks)" in line for line in lines) == 1
    assert len(statuses(lines)) == CHECKS


@pytest.fixture
def silence() -> Iterator[int]:
    """A port that accepts every connection and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(256)
        taken: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for connection in taken:
            connection.close()


def test_it_ends_where_nobody_answers(tmp_path: Path, silence: int) -> None:
    code, lines = doctor(
        tmp_path,
        "--data.root=s3://bucket/images",
        "--run.output=s3://bucket/run",
        "--data.image_size_px=32",
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{silence}",
        AWS_ACCESS_KEY_ID="k",
        AWS_SECRET_ACCESS_KEY="s",
        AWS_DEFAULT_REGION="us-east-1",
        WANDB_BASE_URL=f"http://127.0.0.1:{silence}",
        WANDB_API_KEY="a" * 40,
        PET_NNODES="2",
        PET_RDZV_ENDPOINT=f"127.0.0.1:{silence}",
    )
    assert code == 78
    assert len(statuses(lines)) == CHECKS
    row = {
        name: line
        for line in lines
        for name in ("data", "output", "W&B key")
        if f"  {name}  " in line
    }
    assert row["data"].startswith("fail")
    assert row["output"].startswith("fail")
    assert row["W&B key"].startswith("warn")
    fixes = [line for line in lines if "NetworkPolicy and proxy to the storage at --" in line]
    assert len(fixes) == 2, lines
    assert lines[-1].startswith("lightship: ")
