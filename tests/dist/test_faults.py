"""Processes, agents and nodes that die, freeze or are told to stop: nothing is lost, nothing hangs.

Every test ends by comparing with the run that nothing happened to, bit for bit.
"""

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.conftest import QUICK_RENDEZVOUS, Agent, Job, is_alive, until
from tests.support.crashing import CRASH, FOLDER

SLOW_S = 0.1  # a step: 2 s in all, so that there is time to do harm


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> Iterator[Callable]:
    """Times recoveries; all are printed at the end."""
    rows: list[tuple[str, float]] = []

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        began_s = time.monotonic()
        yield
        rows.append((what, time.monotonic() - began_s))

    yield timed
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n\nrecovery, without the seconds of importing:")
        for what, spent_s in rows:
            print(f"  {spent_s:5.1f} s  {what}")


def same(run: Job, reference: Job) -> None:
    """The run has ended where the reference did: weights, optimizer, batches and numbers."""
    got, expected = run.weights(), reference.weights()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    assert run.batches() == reference.batches()
    assert run.numbers() == reference.numbers()


def ended(*agents: Agent) -> list[int]:
    return [agent.wait() for agent in agents]


def finish(run: Job) -> None:
    """Start the run again on two processes, and see it through."""
    agent = run.start("--trainer.devices=2")
    assert agent.wait() == 0, agent.said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_heals_in_place(job, reference, measured, rank: int) -> None:
    run = job()
    agent = run.start("--trainer.devices=2", step_s=SLOW_S)
    run.at_step(4)
    killed = run.worker(rank)
    os.kill(killed, signal.SIGKILL)
    with measured(f"worker {rank} killed: all train again"):
        until(lambda: run.worker(rank) != killed, "a new worker")
        run.at_step(run.committed() + 1)
    assert agent.wait() == 0, agent.said
    assert f"rank {rank} was killed by SIGKILL; restarting all ranks" in agent.said
    same(run, reference)


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def test_killed_data_workers_are_replaced_and_no_rank_restarts(job, reference) -> None:
    run = job("--data.mode=streaming")
    agent = run.start("--trainer.devices=2", step_s=SLOW_S)
    run.at_step(4)
    ranks = [run.worker(rank) for rank in (0, 1)]
    for rank in ranks:
        [data_worker] = children(rank)
        os.kill(data_worker, signal.SIGKILL)
    assert agent.wait() == 0, agent.said
    assert "the data worker was killed by SIGKILL" in agent.said
    assert [run.worker(rank) for rank in (0, 1)] == ranks
    same(run, reference)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_an_image_that_kills_data_workers(job, images, tmp_path: Path, policy: str) -> None:
    """Each rank finds it when its share holds it; the others wait meanwhile."""
    deadly = tmp_path / "deadly"
    shutil.copytree(images, deadly)
    with (deadly / "train/bee/007.png").open("ab") as file:
        file.write(CRASH)
    flags = [f"--data.root={deadly}", f"--data.on_error={policy}", "--data.max_bad_fraction=0.1"]
    run = job("--data.mode=streaming", *flags)
    agent = run.start("--trainer.devices=2", PYTHONPATH=FOLDER)
    code = agent.wait()
    if policy == "raise":
        assert code == 65, agent.said
        assert "train/bee/007.png: the data worker was killed by SIGSEGV" in agent.said
        return
    assert code == 0, agent.said
    assert "train: 1 of 60 images could not be read and are skipped" in agent.said


def test_a_stopped_job_leaves_no_data_worker(job) -> None:
    """Launchers signal the whole group; the ranks still decode while they come to an agreement."""
    run = job("--data.mode=streaming")
    agent = run.start("--trainer.devices=2", step_s=SLOW_S)
    run.at_step(4)
    data_workers = [pid for rank in (0, 1) for pid in children(run.worker(rank))]
    assert len(data_workers) == 2
    os.killpg(os.getpgid(run.worker(0)), signal.SIGTERM)
    assert agent.wait() == 143, agent.said
    assert f"checkpoint saved at step {run.committed()};" in agent.said
    until(lambda: not any(map(is_alive, data_workers)), "the data workers' end", bound_s=5)


def test_a_frozen_worker_is_noticed(job, reference, measured) -> None:
    run = job("--trainer.timeout_s=3")
    agent = run.start(
        "--trainer.devices=2", step_s=SLOW_S, PET_MAX_RESTARTS="0", PET_SHUTDOWN_TIMEOUT="2"
    )
    run.at_step(4)
    os.kill(run.worker(1), signal.SIGSTOP)
    with measured("a worker frozen, timeout_s 3: the job has ended"):
        assert agent.wait(bound_s=25) == 74, agent.said  # not torch's 30 s for a deaf worker
    assert "no answer from rank 1 within --trainer.timeout_s" in agent.said
    finish(run)
    same(run, reference)


def test_a_worker_frozen_in_validation_is_noticed(job) -> None:
    """The others agree on stop requests there, in a process group of its own."""
    run = job("--trainer.timeout_s=3")
    agent = run.start(
        "--trainer.devices=2", hook="validating", step_s=1,
        PET_MAX_RESTARTS="0", PET_SHUTDOWN_TIMEOUT="2",
    )  # fmt: skip
    path = run.folder / "validated"
    until(lambda: path.exists() and '"rank": 1' in path.read_text(), "rank 1 to validate")
    os.kill(run.worker(1), signal.SIGSTOP)
    assert agent.wait() == 74, agent.said
    assert "no answer from rank 1 within --trainer.timeout_s" in agent.said


def test_a_checkpoint_may_take_longer_than_the_timeout(job) -> None:
    """To write, while the others train on, and to read."""
    run = job("--trainer.timeout_s=3", "--run.checkpoint_every_steps=4")
    for epochs in (1, 2):
        flags = ("--trainer.devices=2", f"--trainer.max_epochs={epochs}")
        agent = run.start(*flags, hook="slow_checkpoints", PET_MAX_RESTARTS="0")
        assert agent.wait() == 0, agent.said


def test_a_hung_job_that_the_probe_ends_is_a_timeout(job, tmp_path: Path) -> None:
    """Kubernetes' liveness probe sends SIGTERM, as an eviction does, which is no failure."""
    beat = tmp_path / "beat"
    run = job()
    agent = run.start(
        "--trainer.devices=2", step_s=SLOW_S, PET_SHUTDOWN_TIMEOUT="2",
        LIGHTSHIP_HEARTBEAT_FILE=str(beat),
    )  # fmt: skip
    run.at_step(4)
    for rank in (0, 1):
        os.kill(run.worker(rank), signal.SIGSTOP)
    long_ago_s = time.time() - 3600
    os.utime(beat, (long_ago_s, long_ago_s))
    agent.kill(signal.SIGTERM)
    assert agent.wait() == 74, agent.said
    assert "no step for half an hour: stopped by the liveness probe" in agent.said


def test_a_frozen_rank_0_is_noticed(job) -> None:
    """It keeps the store at which the others would report."""
    run = job("--trainer.timeout_s=3")
    agent = run.start(
        "--trainer.devices=2", step_s=SLOW_S, PET_MAX_RESTARTS="0", PET_SHUTDOWN_TIMEOUT="2"
    )
    run.at_step(4)
    os.kill(run.worker(0), signal.SIGSTOP)
    assert agent.wait() == 74, agent.said
    assert "no answer from rank 0 within --trainer.timeout_s" in agent.said


@pytest.mark.parametrize("whom", ["rank 1", "agent"])
def test_told_to_stop(job, reference, measured, whom: str) -> None:
    run = job()
    agent = run.start("--trainer.devices=2", step_s=SLOW_S)
    run.at_step(4)
    os.kill(run.worker(1) if whom == "rank 1" else agent.pid, signal.SIGTERM)
    with measured(f"SIGTERM to the {whom}: saved and gone"):
        assert agent.wait() == 143, agent.said
    assert f"checkpoint saved at step {run.committed()};" in agent.said
    assert run.committed() < 20
    finish(run)
    same(run, reference)


def test_one_node_told_to_stop_stops_both(job, reference, measured) -> None:
    run = job()
    agents = [hosting(run), run.start_node(step_s=SLOW_S)]
    run.at_step(4)
    agents[1].kill(signal.SIGTERM)
    with measured("SIGTERM to one of two agents: both saved and gone"):
        assert [agent.wait(bound_s=15) for agent in agents] == [143, 143]
    finish(run)
    same(run, reference)


def hosting(run: Job, step_s: float = SLOW_S, **options: Any) -> Agent:
    """A first node, which is there before the others: the rendezvous is with it."""
    agent = run.start_node(step_s=step_s, **options)
    until(lambda: port_is_open(run.port), "the rendezvous' host")
    return agent


def port_is_open(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("localhost", port)) == 0


def test_told_to_stop_before_the_others_came(job) -> None:
    run = job()
    agent = hosting(run)
    agent.kill(signal.SIGTERM)
    assert agent.wait() == 143, agent.said


def test_workers_die_with_their_agent(job, reference, measured) -> None:
    run = job()
    agent = run.start("--trainer.devices=2", step_s=0.7)  # they would go on for 10 s
    run.at_step(2)
    workers = [run.worker(rank) for rank in (0, 1)]
    agent.kill(signal.SIGKILL)
    with measured("an agent killed: its workers are gone"):
        until(lambda: not any(map(is_alive, workers)), "the workers' end", bound_s=5)
    assert agent.wait() == -signal.SIGKILL
    finish(run)
    same(run, reference)


def test_a_run_that_is_started_twice_is_left_to_the_second(job, reference) -> None:
    """The first does not restart in place: the two would take it from each other for ever."""
    run = job()
    first = run.start("--trainer.devices=2", step_s=0.5)
    run.at_step(2)
    second = run.start("--trainer.devices=2", step_s=SLOW_S)
    assert ended(first, second) == [75, 0], first.said + second.said
    assert "has taken over" in first.said
    assert "restarting all ranks" not in first.said + second.said
    same(run, reference)


def test_a_lost_node_is_waited_for(job, reference, measured) -> None:
    run = job()
    agents = [hosting(run), run.start_node(step_s=SLOW_S)]
    run.at_step(4)
    agents[1].kill(signal.SIGKILL)
    with measured("one of two agents killed and replaced at once: both train again"):
        agents[1] = run.start_node(step_s=SLOW_S)
        until(lambda: "restarting all ranks" in agents[0].said, "the loss to be noticed")
        run.at_step(run.committed() + 1)
    assert ended(*agents) == [0, 0]
    same(run, reference)


def test_a_node_that_gave_up_is_replaced(job, reference) -> None:
    """Its end must not close the rendezvous for the others."""
    run = job()
    agents = [hosting(run), run.start_node(step_s=SLOW_S, PET_MAX_RESTARTS="0")]
    run.at_step(4)
    parents = {int(Path(f"/proc/{run.worker(r)}/stat").read_text().split()[3]): r for r in (0, 1)}
    os.kill(run.worker(parents[agents[1].pid]), signal.SIGKILL)
    assert agents[1].wait() == 1, agents[1].said
    assert "killed by SIGKILL" in agents[1].said
    agents[1] = run.start_node(step_s=SLOW_S)
    assert ended(*agents) == [0, 0], agents[0].said
    same(run, reference)


def test_a_lost_host_ends_the_others(job, reference, measured) -> None:
    run = job()
    host = hosting(run)
    other = run.start_node(step_s=SLOW_S)
    run.at_step(4)
    host.kill(signal.SIGKILL)
    with measured("the rendezvous' host killed: the other has ended"):
        assert other.wait() == 75, other.said
    again = [run.start_node(), run.start_node()]
    assert ended(*again) == [0, 0]
    same(run, reference)


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_no_node_ends_with_0_before_the_last_write(job, images, reference, command: str) -> None:
    """Rank 0's node dies when all else is done: a node that had ended with 0 would not come back.

    The other would wait for it in vain.
    """
    run, flags = job(), ()
    if command == "predict":
        run.output = reference.output
        flags = (f"--data.root={images}/test", f"--predictions={run.folder / 'table.csv'}")
    options = {"command": command, "PET_MAX_RESTARTS": "0"}
    agents = [
        run.start_node(*flags, hook="killed_at_the_end", **options),
        run.start_node(*flags, hook="killed_at_the_end", **options),
    ]
    assert sorted(ended(*agents)) == [-signal.SIGKILL, 75], [agent.said for agent in agents]
    again = run.start("--trainer.devices=2", *flags, command=command)
    assert again.wait() == 0, again.said
    if command == "fit":
        same(run, reference)
    else:
        assert (run.folder / "table.csv").read_text().count("\n") == 6


def test_a_frozen_host_ends_the_others(job, reference, measured) -> None:
    """Its connections stay open, and nothing comes over them."""
    run = job("--trainer.timeout_s=3")
    conf = QUICK_RENDEZVOUS.replace("read_timeout=20", "read_timeout=3")
    host = hosting(run, PET_RDZV_CONF=conf)
    other = run.start_node(step_s=SLOW_S, PET_RDZV_CONF=conf, PET_SHUTDOWN_TIMEOUT="2")
    run.at_step(4)
    host.kill(signal.SIGSTOP)  # its worker goes on, and ends with what the other's end means
    os.kill(run.worker(parent_is(run, host)), signal.SIGSTOP)
    with measured("the rendezvous' host frozen, read_timeout 3: the other has ended"):
        assert other.wait() == 75, other.said
    assert "lost the rendezvous" in other.said
    host.kill(signal.SIGKILL)
    again = [run.start_node(), run.start_node()]
    assert ended(*again) == [0, 0]
    same(run, reference)


@pytest.mark.parametrize(
    ("hook", "is_host"),
    [
        ("killed_after_joining", False),
        ("killed_after_joining", True),
        ("frozen_after_joining", True),
    ],
)
def test_a_node_lost_just_after_the_rendezvous(job, hook: str, is_host: bool) -> None:
    """The agents tell each other of their workers then."""
    run = job()
    conf = QUICK_RENDEZVOUS.replace("read_timeout=20", "read_timeout=3")
    first, second = (hook, "plain") if is_host else ("plain", hook)
    agents = [hosting(run, hook=first, PET_RDZV_CONF=conf)]
    agents.append(run.start_node(hook=second, PET_RDZV_CONF=conf))
    other = agents[1 if is_host else 0]
    assert other.wait() == 75, other.said
    assert f"lost the rendezvous at localhost:{run.port}: " in other.said
    assert "Traceback" not in other.said


def test_a_host_that_freezes_when_all_is_done(job, reference) -> None:
    """The other does not wait for it for ever: the run is complete."""
    run = job()
    conf = QUICK_RENDEZVOUS.replace("read_timeout=20", "read_timeout=3")
    hosting(run, step_s=0, hook="frozen_at_the_end", PET_RDZV_CONF=conf)
    other = run.start_node(hook="late_at_the_end", PET_RDZV_CONF=conf)
    assert other.wait() == 0, other.said
    same(run, reference)


def parent_is(run: Job, agent: Agent) -> int:
    """The rank of the agent's worker."""
    parents = {int(Path(f"/proc/{run.worker(r)}/stat").read_text().split()[3]): r for r in (0, 1)}
    return parents[agent.pid]


@pytest.mark.parametrize(("nodes", "count"), [("1:2", 1), ("2:3", 2)])
def test_a_node_joins_a_run_that_goes_on(job, reference, measured, nodes: str, count: int) -> None:
    """The run grows by a node, step for step; nobody counts that as a failure."""
    run = job()
    # Eight steps may pass until all agree; the twenty must not be over by then.
    options = {"nodes": nodes, "step_s": 0.8, "PET_MAX_RESTARTS": "0"}
    agents = [hosting(run, **options), *(run.start_node(**options) for _ in range(count - 1))]
    run.at_step(2)
    with measured(f"PET_NNODES={nodes}, one node more comes: all train"):
        agents.append(run.start_node(**options))
        until(lambda: (run.folder / f"pid-{count}").exists(), "the new rank")
        next_step = run.committed() + 1
        (run.folder / "hurry").touch()
        run.at_step(next_step)
    assert ended(*agents) == [0] * (count + 1), [agent.said for agent in agents]
    assert run.batches() == reference.batches()
    lines = [json.loads(line) for line in (run.folder / "ids").open()]
    assert {line["world"] for line in lines} == {count, count + 1}
    for name, value in run.numbers().items():
        assert value == pytest.approx(reference.numbers()[name], abs=1e-3), name
