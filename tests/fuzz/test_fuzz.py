"""The fuzzing suite at the length that `make test` can afford, and proof that it finds things."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import targets
from tests.fuzz.runner import Target, fuzz

_ROOT = Path(__file__).parents[2]


def test_every_mutated_file_is_read_or_refused(tmp_path: Path) -> None:
    """As `make fuzz`, in a process of its own: a fork needs one without threads."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--files=80", "--seed=1"],
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LIGHTSHIP_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for target in targets.TARGETS:
        assert f"| {target.name} |" in done.stdout


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_the_valid_files_are_read(target: Target, tmp_path: Path) -> None:
    """Else every mutation would end in the same refusal."""
    for number, data in enumerate(target.seeds()):
        folder = tmp_path / str(number)
        folder.mkdir()
        target.read(data, folder)


def _crash(data: bytes, folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _hog(data: bytes, folder: Path) -> None:
    bytearray(b"x" * (64 * 2**20))


def _loop(data: bytes, folder: Path) -> None:
    while True:
        pass


def _raise(data: bytes, folder: Path) -> None:
    raise ValueError("not ours")


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (_crash, "SIGSEGV"),
        (_hog, "MiB of memory"),
        (_loop, "no end"),
        (_raise, "ValueError: not ours"),
        (lambda data, folder: None, ""),
    ],
)
def test_what_the_runner_finds(
    read: Callable[[bytes, Path], None], expected: str, tmp_path: Path
) -> None:
    target = Target("toy", lambda: [b"a file"], read, max_mib=32, max_cpu_s=0.2)
    outcome = fuzz(target, range(2), 1, tmp_path)
    if not expected:
        assert not outcome.findings
        assert outcome.returned == 2
        return
    assert len(outcome.findings) == 2
    assert all(expected in text for text in outcome.findings), outcome.findings
    assert len(list((tmp_path / "findings").iterdir())) == 2
