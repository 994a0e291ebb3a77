"""How a job of several processes is started and what its end says: codes, lines, no second try."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.dist.conftest import BOUND_S, Job, is_alive, until


def test_missing_data_ends_both_nodes_at_once(job) -> None:
    run = job("--data.root=/nowhere/at/all")
    agents = [run.start_node(), run.start_node()]
    for agent in agents:
        assert agent.wait() == 65, agent.said
        assert "--data.root /nowhere/at/all" in agent.said
        assert "restarting" not in agent.said
        assert "Traceback" not in agent.said
        assert agent.said.count("lightship: ") == 1


def test_an_output_that_each_node_has_for_itself(job) -> None:
    """A restart would find the checkpoints of one node only."""
    run = job()
    own = [f"--run.output={run.folder}/node-{number}" for number in (0, 1)]
    agents = [run.start_node(flag, hook="impatient") for flag in own]
    for agent in agents:
        assert agent.wait() == 78, agent.said
        assert "is a local folder, and node 1 does not see what node 0 wrote there" in agent.said
        assert agent.said.count("lightship: ") == 1


def test_a_batch_that_does_not_divide(job) -> None:
    agent = job().start("--trainer.devices=5")
    assert agent.wait() == 78, agent.said
    assert "--data.global_batch_size 12 is not divisible by 5" in agent.said
    assert "restarting" not in agent.said


def test_a_tracker_that_cannot_start_ends_all(job) -> None:
    """An error of rank 0 alone, while the others are ahead of it."""
    agents = [
        run.start_node("--run.tracking=offline", WANDB_MODE="no-such-mode")
        for run in [job()]
        for _ in range(2)
    ]
    for agent in agents:
        assert agent.wait() == 78, agent.said
        assert "WANDB_MODE" in agent.said


def test_an_error_of_one_rank_is_told_with_its_last_lines(job) -> None:
    agent = job("--model.net=tests.dist.nets:fails_on_rank_1").start("--trainer.devices=2")
    assert agent.wait() == 1, agent.said
    assert agent.said.count("restarting all ranks") == 1, "the same error twice is enough"
    assert "rank 1 exited with code 1: ArithmeticError('broken on purpose')" in agent.said
    assert "[rank 1] " in agent.said
    output = agent.said.rpartition("full output: ")[2].split()[0]
    assert "ArithmeticError" in Path(output).read_text()


def test_a_node_that_comes_after_the_end_waits_for_nobody(job, reference: Job) -> None:
    late = job()
    late.output = reference.output
    agent = late.start_node()
    assert agent.wait() == 0, agent.said
    assert "run already complete" in agent.said


@pytest.mark.parametrize(
    ("conf", "line"),
    [
        ("join_timeout=2,read_timeout=10", "fewer than 2 nodes (PET_NNODES) joined localhost:"),
        ("is_host=0,join_timeout=2,read_timeout=1", "cannot connect to localhost:"),
    ],
    ids=["no second node", "no host"],
)
def test_nodes_that_do_not_come(job, conf: str, line: str) -> None:
    run = job()
    agent = run.start(
        PET_NNODES="2", PET_RDZV_ENDPOINT=f"localhost:{run.port}", PET_RDZV_CONF=conf,
        PET_LOCAL_ADDR="localhost",
    )  # fmt: skip
    assert agent.wait() == 74, agent.said
    assert line in agent.said


_RANK_0 = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
_STATIC = {"PET_RDZV_BACKEND": "static", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "localhost"}


@pytest.mark.parametrize(
    ("environment", "port", "line"),
    [
        (_RANK_0, "MASTER_PORT", "MASTER_ADDR:MASTER_PORT must be free on the node of rank 0:"),
        (
            {**_STATIC, "PET_NNODES": "2"},
            "PET_MASTER_PORT",
            "PET_MASTER_ADDR:PET_MASTER_PORT must be free on node 0:",
        ),
    ],
    ids=["by hand", "static rendezvous"],
)
def test_a_taken_port(job, environment: dict[str, str], port: str, line: str) -> None:
    with socket.create_server(("", 0)) as taken:
        number = taken.getsockname()[1]
        agent = job().start(**environment, **{port: str(number)})
        assert agent.wait() == 74, agent.said
    assert f":{number} (Address already in use); {line}" in agent.said
    assert "Traceback" not in agent.said
    assert agent.said.count("lightship: ") == 1


@pytest.mark.parametrize("is_freed", [True, False])
def test_a_taken_port_of_the_rendezvous_is_tried_again(job, is_freed: bool) -> None:
    """The last start's agent may still listen there."""
    run = job()
    conf = "is_host=1,last_call_timeout=1,join_timeout=" + ("60" if is_freed else "3")
    with socket.create_server(("", run.port)) as taken:
        host = run.start_node(nodes="1:2", PET_RDZV_CONF=conf)
        if is_freed:
            until(lambda: host.log_path.exists() and "no secret" in host.said, "the agent")
        else:
            assert host.wait() == 74, host.said
        taken.close()
    if is_freed:
        assert host.wait() == 0, host.said
        return
    assert f"localhost:{run.port} (Address already in use); PET_RDZV_ENDPOINT must be free on" in (
        host.said
    )
    assert "not free within 3 s (join_timeout in PET_RDZV_CONF)" in host.said
    assert "MASTER_PORT" not in host.said


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"PET_NNODES": "2"}, "set PET_RDZV_ENDPOINT to HOST:PORT of node 0"),
        ({"PET_NNODES": "3:2"}, "PET_NNODES is '3:2'"),
        ({"PET_NPROC_PER_NODE": "3"}, "--trainer.devices is 2 but PET_NPROC_PER_NODE is 3"),
        (
            {"PET_LOG_DIR": "/dev/null/logs"},
            "a PET_* variable is wrong: [Errno 20] Not a directory: '/dev/null/logs'",
        ),
        ({"PET_NPROC_PER_NODE": "gpus"}, "PET_NPROC_PER_NODE is 'gpus'"),
        ({"PET_NPROC_PER_NODE": "0", "PET_NNODES": "2"}, "PET_NPROC_PER_NODE is 0"),
        *(
            (
                {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": endpoint},
                f"PET_RDZV_ENDPOINT is '{endpoint}'; it must be HOST:PORT with a port from 1 to",
            )
            for endpoint in ("node-0:abc", "localhost:99999", "/node-0:29400")
        ),
        (
            {"PET_NNODES": "2", "PET_MASTER_ADDR": "node-0/", "PET_MASTER_PORT": "29400"},
            "PET_MASTER_ADDR:PET_MASTER_PORT is 'node-0/:29400'",
        ),
        (
            {
                "PET_NNODES": "2",
                "PET_RDZV_BACKEND": "static",
                "PET_NODE_RANK": "0",
                "PET_RDZV_ENDPOINT": "localhost",
            },
            "PET_RDZV_ENDPOINT is 'localhost'; it must be HOST:PORT",
        ),
        *(
            ({"PET_RDZV_CONF": conf}, f"PET_RDZV_CONF has {conf}; it must be a whole number from 1")
            for conf in ("join_timeout=10m", "read_timeout=x", "keep_alive_interval=0")
        ),
        ({"PET_RDZV_CONF": "is_host=perhaps"}, "is_host=perhaps; it must be true or false"),
        (
            {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "localhost", "PET_RDZV_BACKEND": "foo"},
            "PET_RDZV_BACKEND is 'foo'; it must be c10d or another",
        ),
    ],
)
def test_a_wrong_environment(job, environment: dict[str, str], line: str) -> None:
    devices = "auto" if environment.get("PET_NPROC_PER_NODE") in ("gpus", "0") else "2"
    agent = job().start(f"--trainer.devices={devices}", **environment)
    assert agent.wait() == 78, agent.said
    assert line in agent.said
    assert "Traceback" not in agent.said


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"PET_NPROC_PER_NODE": "2"},
        {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "localhost:1"},
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
    ],
    ids=["one process", "two processes", "two nodes", "torchrun"],
)
def test_gpus_are_required_and_there_are_none(job, environment: dict[str, str]) -> None:
    """Said before anything is read and before any peer is waited for."""
    flags = ["--trainer.accelerator=gpu", "--data.root=/nowhere/at/all"]
    agent = job().start(*flags, CUDA_VISIBLE_DEVICES="", **environment)
    assert agent.wait() == 78, agent.said
    assert "--trainer.accelerator gpu: torch can use no GPU of this node (" in agent.said
    assert agent.said.count("lightship: ") == 1
    assert "Traceback" not in agent.said


def test_one_image_a_device_and_batchnorm(job) -> None:
    agent = job().start("--trainer.devices=2", "--data.global_batch_size=2", "--model.net=resnet18")
    assert agent.wait() == 78, agent.said
    assert "--data.global_batch_size / devices / --trainer.accumulate_grad_batches" in agent.said


def same(run: Job, reference: Job) -> None:
    expected = reference.weights()
    assert run.weights().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in run.weights().items())
    assert run.numbers() == reference.numbers()


def test_started_by_hand_or_mpi(job, reference: Job) -> None:
    """RANK, WORLD_SIZE and an address are enough, and nothing is launched once more."""
    run = job()
    ranks = [
        run.start(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="localhost", MASTER_PORT=str(run.port),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].said
    same(run, reference)


def test_torchs_static_rendezvous(job, reference: Job) -> None:
    run = job()
    nodes = [
        run.start(
            PET_NNODES="2", PET_NPROC_PER_NODE="1", PET_RDZV_BACKEND="static",
            PET_NODE_RANK=str(rank), PET_MASTER_ADDR="127.0.0.1", PET_MASTER_PORT=str(run.port),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].said
    same(run, reference)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_alone(job, rank: int) -> None:
    run = job()
    alone = run.start(
        "--trainer.timeout_s=2", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(run.port),
    )  # fmt: skip
    assert alone.wait() == 74, alone.said
    assert "within --trainer.timeout_s: " in alone.said


def test_a_worker_told_to_stop_while_it_starts(job) -> None:
    agent = (run := job()).start("--trainer.devices=2", hook="late")
    os.kill(run.worker(1), signal.SIGTERM)
    assert agent.wait() == 143, agent.said
    assert "restarting" not in agent.said


def test_started_by_slurm(job, reference: Job) -> None:
    run = job()
    tasks = [
        run.start(
            SLURM_NTASKS="2", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_NODEID="0",
            SLURM_NNODES="1", SLURM_NTASKS_PER_NODE="2", SLURM_JOB_NAME="train",
            SLURM_JOB_ID="4711", SLURM_NODELIST="localhost", SLURM_STEP_NUM_TASKS="2",
            MASTER_PORT=str(run.port),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    assert [task.wait() for task in tasks] == [0, 0], tasks[0].said
    same(run, reference)


def test_as_a_user_types_it(job, reference: Job, tmp_path: Path) -> None:
    """Fresh interpreters: an agent is killed, its workers go; another run is torchrun's."""
    run = job("--model.net=tests.dist.nets:sleepy")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    log = (tmp_path / "log").open("w+")
    options = {"env": environment, "stdout": log, "stderr": log}
    fit = [sys.executable, "-m", "lightship", "fit", f"--run.output={run.output}", *run.flags]
    agent = subprocess.Popen([*fit, "--trainer.devices=2"], **options)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")

    def ranks() -> list[str]:
        """The two ranks, not the process that decodes images meanwhile."""
        found = []
        for pid in children.read_text().split():
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has ended
                if b"LOCAL_RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(pid)
        return found if len(found) == 2 else []

    try:
        workers = until(ranks, "two ranks")
        until(lambda: run.committed() or agent.poll() is not None, "a first checkpoint")
    finally:
        agent.send_signal(signal.SIGKILL)
        agent.wait()
    until(lambda: not any(is_alive(int(pid)) for pid in workers), "orphans to die", 5)
    assert run.committed() < 20
    run = job()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]
    fit = ["lightship", "fit", f"--run.output={run.output}", *run.flags]
    done = subprocess.run([*torchrun, *fit], **options, timeout=BOUND_S)
    assert done.returncode == 0, (tmp_path / "log").read_text()
    same(run, reference)
