"""Strangers that reach the ports of a fit of several processes: none of their code runs."""

import base64
import contextlib
import os
import pickle
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lightship.errors import EXIT_CODES
from tests.support.images import little_set, put
from tests.support.s3 import free_ports
from tests.unit.distributed.test_messages import Bomb

BOUND_S = 240.0
STATE = "torch.rendezvous.none"
"""Where torch keeps the state of the rendezvous; `none` is torchrun's default id."""
_LISTENS = "0A"


class Fit:
    """A started `lightship fit`: the node's agent and all that it starts."""

    def __init__(self, folder: Path, name: str, **env: str) -> None:
        self.log_path = folder / f"{name}.log"
        own = {
            "OMP_NUM_THREADS": "1", "LIGHTSHIP_RENDEZVOUS_SECRET": "",
            "PET_RDZV_CONF": "keep_alive_interval=1,join_timeout=60,last_call_timeout=1,"
            "read_timeout=20",
        }  # fmt: skip
        command = [
            str(Path(sys.executable).parent / "lightship"), "fit",
            f"--data.root={folder / 'images'}", f"--run.output={folder / 'run'}",
            "--run.tracking=offline", "--data.mode=streaming", "--data.global_batch_size=12",
            "--model.net=litcnn", "--trainer.accelerator=cpu", "--trainer.max_epochs=100",
            "--trainer.timeout_s=30",
        ]  # fmt: skip
        if "PET_NNODES" not in env:
            command.append("--trainer.devices=2")
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env={**os.environ, **own, **env}, stdout=log, stderr=log
            )

    @property
    def said(self) -> str:
        return self.log_path.read_text()

    def wait(self) -> int:
        try:
            return self.process.wait(BOUND_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {BOUND_S} s; it said:\n{self.said}") from None

    def processes(self) -> list[int]:
        """It and all that it has started, W&B's process included."""
        parents = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has just ended
                continue
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def listeners(self) -> set[tuple[str, int]]:
        """(address in hex, port) of each TCP socket on which one of its processes listens."""
        inodes = set()
        for pid in self.processes():
            for path in Path(f"/proc/{pid}/fd").glob("*"):
                try:
                    inodes.add(os.readlink(path))
                except OSError:
                    continue
        found = set()
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in Path(table).read_text().splitlines()[1:]:
                _, here, _, state, *_, inode = line.split()[:10]
                if state == _LISTENS and f"socket:[{inode}]" in inodes:
                    address, port = here.split(":")
                    found.add((address, int(port, 16)))
        return found

    def environments(self) -> str:
        return "".join(Path(f"/proc/{pid}/environ").read_text() for pid in self.processes())

    def is_training(self) -> bool:
        assert self.process.poll() is None, self.said
        return "best loss" in self.said


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Fit]]:
    put(str(tmp_path / "images"), little_set(("train", "val"), per_class=8, size_px=(16, 16)))
    started: list[Fit] = []

    def begin(**env: str) -> Fit:
        started.append(Fit(tmp_path, f"node-{len(started)}", **env))
        return started[-1]

    yield begin
    for fit in started:
        for pid in fit.processes() if fit.process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        fit.process.wait()


def until(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + BOUND_S
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {BOUND_S} s for {what}"
        time.sleep(0.05)
    return value


def attack(host: str, port: int, mark: Path) -> int:
    """Put pickles that run code into all keys of torch's store; the number of keys."""
    bomb = pickle.dumps(Bomb(mark))
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
    keys = {STATE, *store.list_keys()} if hasattr(store, "list_keys") else {STATE}
    for key in keys:
        store.set(key, base64.b64encode(bomb).decode())
    return len(keys)


def send_junk(host: str, port: int) -> None:
    with socket.create_connection((host, port), 10) as connection:
        connection.sendall(secrets.token_bytes(64) + b"GET / HTTP/1.1\r\n\r\n")


def test_strangers_on_one_node(start, tmp_path: Path) -> None:
    """It listens on 127.0.0.1 only; who reaches that may disturb but runs nothing."""
    fit = start()
    until(fit.is_training, "training")
    listeners = fit.listeners()
    assert len(fit.processes()) >= 6, "the agent, ranks, their data workers and W&B"
    assert len(listeners) >= 2, "the store, and gloo"
    assert {address for address, _ in listeners} == {"0100007F"}  # 127.0.0.1
    store = re.search(r"MASTER_PORT=(\d+)", fit.environments())
    assert store, "ranks meet at a port"
    assert attack("127.0.0.1", int(store[1]), tmp_path / "mark") > 1
    for _, port in listeners:  # gloo's too
        send_junk("127.0.0.1", port)
    code = fit.wait()
    assert not (tmp_path / "mark").exists()
    assert code in {row.code for row in EXIT_CODES.values()}, fit.said
    assert "Traceback" not in fit.said


@pytest.mark.parametrize("secret", ["", "0123456789abcdef0123"])
def test_strangers_at_the_rendezvous(start, tmp_path: Path, secret: str) -> None:
    """While node 0 waits for the others."""
    port, mark = free_ports(1)[0], tmp_path / "mark"
    nodes = {
        "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_RDZV_ENDPOINT": f"127.0.0.1:{port}",
        "PET_LOCAL_ADDR": "127.0.0.1", "LIGHTSHIP_RENDEZVOUS_SECRET": secret,
    }  # fmt: skip
    fit = start(**nodes)
    assert until(fit.listeners, "a port") == {("0100007F", port)}
    attack("127.0.0.1", port, mark)

    def has_ended() -> bool:
        """Attacks again: node 0 may not have waited yet, and have made a new rendezvous."""
        with contextlib.suppress(RuntimeError):  # nobody listens any more
            attack("127.0.0.1", port, mark)
        return fit.process.poll() is not None

    until(has_ended, "its end")
    code = fit.wait()
    assert not mark.exists()
    assert code == 78, fit.said
    assert f"the rendezvous at 127.0.0.1:{port} holds a state that is not signed" in fit.said
    assert ("no secret for 2 nodes" in fit.said) == (not secret)
    assert "Traceback" not in fit.said


def test_strangers_while_two_nodes_train(start, tmp_path: Path) -> None:
    port, mark = free_ports(1)[0], tmp_path / "mark"
    nodes = {
        "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_RDZV_ENDPOINT": f"127.0.0.2:{port}",
        "LIGHTSHIP_RENDEZVOUS_SECRET": secrets.token_hex(),
    }  # fmt: skip
    fits = [start(**nodes, PET_LOCAL_ADDR=f"127.0.0.{number}") for number in (2, 3)]
    until(lambda: any(fit.is_training() for fit in fits), "training")
    assert {address for fit in fits for address, _ in fit.listeners()} >= {"0200007F"}
    assert all(address != "0" * len(address) for fit in fits for address, _ in fit.listeners())
    assert attack("127.0.0.2", port, mark) > 0
    codes = [fit.wait() for fit in fits]
    assert not mark.exists()
    assert set(codes) <= {row.code for row in EXIT_CODES.values()}, [fit.said for fit in fits]
    for fit in fits:
        assert not re.search("Traceback", fit.said), fit.said
