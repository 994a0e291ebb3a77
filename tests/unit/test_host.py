"""Cores within the limit of a container, and torch's threads by them."""

import subprocess
import sys

import pytest

from lightship.host import Limits, cores_within

CODE = """
import os, sys
import torch
from lightship.distributed.launcher import _keep_to_cpu_limit
torch.set_num_threads(7)
_keep_to_cpu_limit(visible=8, usable=int(sys.argv[1]))
print(torch.get_num_threads())
"""


@pytest.mark.parametrize(
    ("cpus", "cores"), [(None, 8), (0.5, 1), (1.9, 1), (3.0, 3), (3.7, 3), (8.0, 8), (64.0, 8)]
)
def test_whole_cores_within_the_limit(cpus: float | None, cores: int) -> None:
    assert cores_within(8, Limits(cpus, None, "cgroup v2")) == cores


@pytest.mark.parametrize(("usable", "threads"), [("3", "3"), ("8", "7")])
def test_torch_keeps_to_the_limit(usable: str, threads: str, monkeypatch) -> None:
    """Without one, its own number stays."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run = [sys.executable, "-c", CODE, usable]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == threads


def test_a_number_that_is_set_stays(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    run = [sys.executable, "-c", CODE, "3"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == "7"
