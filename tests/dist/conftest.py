"""Jobs of several processes and nodes on this machine, and what they leave."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightship.checkpoint.store import CheckpointStore
from tests.support.images import little_set, put
from tests.support.s3 import free_ports

BOUND_S = 120.0
"""Of every wait here: far above what is waited for, on a machine that does other things too."""
QUICK_RENDEZVOUS = (
    "keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=60,last_call_timeout=2,"
    "read_timeout=20"
)


def until(condition: Callable[[], Any], what: str, bound_s: float = BOUND_S) -> Any:
    """The first true value of `condition`; fails after `bound_s`."""
    end = time.monotonic() + bound_s
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {bound_s} s for {what}"
        time.sleep(0.02)
    return value


class Agent:
    """A started `lightship` command: one process, or a node's agent with its workers."""

    def __init__(self, pid: int, status_path: Path, log_path: Path) -> None:
        self.pid, self.status_path, self.log_path = pid, status_path, log_path

    @property
    def said(self) -> str:
        return self.log_path.read_text()

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, bound_s: float = BOUND_S) -> int:
        """Its exit code; minus the signal that killed it."""
        try:
            until(self.status_path.exists, "the end", bound_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n{self.said}") from None
        return int(self.status_path.read_text())


class Job:
    """One run's output and the agents that work on it.

    Args:
        zygote: Starts processes.
        folder: Everything lies here.
        flags: Of `lightship fit`.
    """

    def __init__(self, zygote: "Zygote", folder: Path, flags: tuple[str, ...]) -> None:
        self.zygote, self.folder, self.flags = zygote, folder, flags
        self.output = folder / "run"
        self.agents: list[Agent] = []
        self.port = free_ports(1)[0]
        folder.mkdir()

    def start(
        self,
        *flags: str,
        command: str = "fit",
        step_s: float = 0.0,
        hook: str = "plain",
        **env: str,
    ) -> Agent:
        name = f"agent-{len(self.agents)}"
        arguments = [command, f"--run.output={self.output}", *self.flags, *flags]
        env = {
            "TEST_FOLDER": str(self.folder),
            "TEST_HOOK": f"tests.dist.hooks:{hook}",
            "TEST_STEP_S": str(step_s),
            "PET_MONITOR_INTERVAL": "0.05",
            **env,
        }
        agent = self.zygote.start(arguments, self.folder / name, env)
        self.agents.append(agent)
        return agent

    def start_node(self, *flags: str, nodes: str = "2", **options: Any) -> Agent:
        """One of several nodes on this machine, with one worker unless told otherwise."""
        meeting = {
            "PET_NNODES": nodes,
            "PET_NPROC_PER_NODE": "1",
            "PET_RDZV_ENDPOINT": f"localhost:{self.port}",
            "PET_RDZV_ID": self.folder.parent.name,
            "PET_LOCAL_ADDR": "localhost",
            "PET_RDZV_CONF": QUICK_RENDEZVOUS,
        }
        return self.start(*flags, **{**meeting, **options})

    def worker(self, rank: int) -> int:
        """The pid of a rank's newest process."""
        path = self.folder / f"pid-{rank}"
        return int(until(lambda: path.exists() and path.read_text(), f"rank {rank}"))

    def committed(self) -> int:
        """Step of the newest commit record, 0 if there is none."""
        records = self.output.glob("checkpoints/step-*.commit.json")
        return max((int(path.name.split("-")[1]) for path in records), default=0)

    def at_step(self, step: int) -> None:
        """Wait until a checkpoint of `step` or later is there."""
        try:
            until(lambda: self.committed() >= step or self.is_over, f"step {step}")
            assert self.committed() >= step, f"all have ended before step {step}"
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.state()}") from None

    @property
    def is_over(self) -> bool:
        """Whether no agent runs any more."""
        return all(agent.status_path.exists() for agent in self.agents)

    def state(self) -> str:
        """What the agents have said, and where each process is that still runs."""
        stacks = {path: int(path.name.split("-")[1]) for path in self.folder.glob("stacks-*")}
        for pid in filter(is_alive, stacks.values()):
            os.kill(pid, signal.SIGUSR2)
        time.sleep(1)
        paths = [path for each in self.agents for path in (each.log_path, each.status_path)]
        paths = [path for path in paths if path.exists()]
        paths += [path for path in stacks if is_alive(stacks[path])]
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in paths)

    def checkpoint(self) -> dict[str, Any]:
        """The last one."""
        store = CheckpointStore(str(self.output / "checkpoints"))
        newest = store.newest()
        assert newest is not None
        return store.load_checkpoint(store.url_of(newest))

    def weights(self) -> dict[str, torch.Tensor]:
        """All tensors of the last checkpoint: weights and optimizer."""
        checkpoint = self.checkpoint()
        tensors = dict(checkpoint["state_dict"])
        for index, state in checkpoint["optimizer_states"][0]["state"].items():
            tensors |= {f"{index}.{k}": v for k, v in state.items() if torch.is_tensor(v)}
        return tensors

    def numbers(self) -> dict[str, float]:
        return json.loads((self.output / "DONE").read_text())

    def fast_steps(self, rank: int) -> list[int]:
        """Steps that a rank has taken without Lightning's loop."""
        return [int(line) for line in (self.folder / f"fast-{rank}").read_text().split()]

    def batches(self) -> dict[int, list[int]]:
        """Sorted ids of every global batch by step; every time a step was done, the same."""
        parts: dict[tuple[int, int, int], list[int]] = {}
        for text in (self.folder / "ids").read_text().splitlines():
            line = json.loads(text)
            key = line["step"], line["world"], line["rank"]
            assert parts.setdefault(key, line["ids"]) == line["ids"]
        found: dict[int, list[int]] = {}
        for step, world, _ in parts:
            ids = [i for rank in range(world) for i in parts.get((step, world, rank), ())]
            whole = all((step, world, rank) in parts for rank in range(world))
            if whole:
                assert found.setdefault(step, sorted(ids)) == sorted(ids)
        return found


class Zygote:
    """The process whose forks are the jobs' processes."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.dist.zygote"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, arguments: list[str], path: Path, env: dict[str, str]) -> Agent:
        log, status = path.with_suffix(".log"), path.with_suffix(".status")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "TORCHE"))}
        request = {
            "arguments": arguments,
            "env": {**inherited, "OMP_NUM_THREADS": "1", **env},
            "log": str(log),
            "status": str(status),
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Agent(int(self._line()), status, log)


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    assert zygote.process.stdin is not None
    zygote.process.stdin.close()
    zygote.process.wait(20)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 images to train on, 60 to validate, 5 to test; of three classes."""
    files = little_set(("train", "val"), per_class=20)
    few = list(little_set(("test",), per_class=2).items())[:5]
    return put(str(tmp_path_factory.mktemp("data") / "images"), {**files, **dict(few)})


@pytest.fixture(scope="session")
def flags(images: str) -> tuple[str, ...]:
    return (
        f"--data.root={images}", "--run.tracking=none", "--data.global_batch_size=12",
        "--model.net=tests.dist.nets:plain", "--optim.lr=0.01", "--trainer.max_epochs=4",
        "--trainer.accelerator=cpu", "--trainer.timeout_s=30", "--run.checkpoint_every_steps=2",
        "--data.crop_padding_px=1", "--data.flip=true", "--run.log_images=0",
    )  # fmt: skip


@pytest.fixture
def job(zygote: Zygote, tmp_path: Path, flags: tuple[str, ...]) -> Iterator[Callable[..., Job]]:
    """Makes jobs; whatever they still run is killed at the end, and none may have been left."""
    jobs: list[Job] = []

    def make(*more: str) -> Job:
        jobs.append(Job(zygote, tmp_path / f"job-{len(jobs)}", (*flags, *more)))
        return jobs[-1]

    yield make
    for each in jobs:
        for agent in each.agents:
            if not agent.status_path.exists():
                os.kill(agent.pid, signal.SIGCONT)
                os.kill(agent.pid, signal.SIGKILL)
                agent.wait()
        for path in each.folder.glob("pid-*"):
            until(lambda path=path: not is_alive(int(path.read_text())), f"{path} to end")


def is_alive(pid: int) -> bool:
    """Whether a process runs (one that has ended but is not reaped yet does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="session")
def reference(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, flags) -> Job:
    """The run on two processes that nothing happens to."""
    job = Job(zygote, tmp_path_factory.mktemp("reference") / "job", flags)
    agent = job.start("--trainer.devices=2")
    assert agent.wait() == 0, agent.said
    return job
