"""The names that torch elastic does not promise, and an agent without them."""

import subprocess
import sys

import pytest
import torch
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

from lightship.distributed.elastic_agent import PRIVATE_NAMES

RUN = """
import logging, sys
from lightship.distributed import elastic_agent
from lightship.errors import LightshipError

logging.basicConfig(format="%(levelname)s: %(message)s")
elastic_agent.PRIVATE_NAMES += ("_renamed",)
for arguments in (["--version"], ["fit", "--no.such.flag=1"]):
    try:
        elastic_agent.run_agent(2, arguments, None)
        print("exit code 0", file=sys.stderr)
    except LightshipError as error:
        print(f"exit code {error.exit_code}: {error}", file=sys.stderr)
"""


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_torch_elastic_has_the_private_name(name: str) -> None:
    """Fails by the name when a version of torch no longer has it: restarts are then torchrun's."""
    spec = WorkerSpec("rank", 1, None, entrypoint="python")  # type: ignore[arg-type]
    assert hasattr(LocalElasticAgent(spec, DefaultLogsSpecs()), name)


def test_without_a_private_name_workers_run_as_with_torchrun() -> None:
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if line.startswith(("WARNING", "exit"))]
    warning = f"LocalElasticAgent of torch {torch.__version__} has no _renamed"
    [first, ok, second, usage] = lines
    assert first == second == f"WARNING: restarting workers as torchrun does: {warning}"
    assert ok == "exit code 0"
    assert usage.startswith("exit code 2: ")
