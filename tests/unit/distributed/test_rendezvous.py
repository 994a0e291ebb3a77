"""Connecting to a rendezvous whose host may be that of an earlier start."""

import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.launcher.api import LaunchConfig

from lightship.distributed.rendezvous import launch_settings, open_rendezvous
from lightship.distributed.rendezvous_state import SECRET, SignedState, StateRefused
from lightship.distributed.store import serve
from tests.support.s3 import free_ports

OURS, OTHERS = "the secret of this run", "the secret of an earlier start"
BOUND_S = 60.0


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    [port] = free_ports(1)
    monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setenv("PET_RDZV_ENDPOINT", f"127.0.0.1:{port}")
    monkeypatch.setenv(SECRET, OURS)
    return port


def settings(monkeypatch: pytest.MonkeyPatch, path: Path, join_timeout_s: int) -> LaunchConfig:
    conf = f"is_host=0,join_timeout={join_timeout_s},read_timeout=20"
    monkeypatch.setenv("PET_RDZV_CONF", conf)
    return launch_settings(1, path, is_resumable=True)


def host(port: int, secret: str) -> dist.Store:
    """A node 0 that has written its state."""
    store = serve("127.0.0.1", port, timedelta(seconds=20), "")
    state = SignedState(C10dRendezvousBackend(store, "none"), "none", secret, "here")
    state.set_state(pickle.dumps(dynamic_rendezvous._RendezvousState()))
    return store


def test_the_host_of_an_earlier_start_is_waited_out(port, monkeypatch, tmp_path, caplog) -> None:
    """In Kubernetes a deleted Job's pods live on for their grace, under the new pods' names."""
    given, earlier = settings(monkeypatch, tmp_path, 60), host(port, OTHERS)
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(open_rendezvous, given)
        end = time.monotonic() + BOUND_S
        while "not signed with this node's secret" not in caplog.text and not opened.done():
            assert time.monotonic() < end
            time.sleep(0.02)
        del earlier
        stays = host(port, OURS)
        handler = opened.result(BOUND_S)
    assert handler.num_nodes_waiting() == 0
    assert caplog.text.count("retrying for up to 60 s") == 1
    del stays


def test_a_host_that_stays_another_runs_is_refused(port, monkeypatch, tmp_path) -> None:
    given, stays = settings(monkeypatch, tmp_path, 1), host(port, OTHERS)
    with pytest.raises(StateRefused, match=r"LIGHTSHIP_RENDEZVOUS_SECRET differs"):
        open_rendezvous(given)
    del stays
