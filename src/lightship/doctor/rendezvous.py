"""Whether the nodes can reach each other: the rendezvous's name and its port."""

import contextlib
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from lightship.distributed.rendezvous import launch_settings
from lightship.distributed.store import addresses_of, is_local, listen
from lightship.doctor.checks import Finding, skipped
from lightship.doctor.context import Context

_WAIT_S, _CONNECT_S, _PAUSE_S = 10.0, 2.0, 0.3
_FIX_ALL_NODES = (
    "start the doctor on all nodes at once (it listens on node 0), set PET_RDZV_ENDPOINT (or "
    "MASTER_ADDR and MASTER_PORT) to the name and port of node 0, and allow the port through "
    "firewall and NetworkPolicy"
)


class Endpoint(NamedTuple):
    """Where the nodes meet.

    Attributes:
        host: Name or address of node 0.
        port: Of the rendezvous.
        nodes: Of the job.
        is_host: Whether this is node 0; None: its name tells.
        variable: The variable that sets it.
    """

    host: str
    port: int
    nodes: int
    is_host: bool | None
    variable: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port} ({self.variable})"


def find_endpoint() -> Endpoint | None:
    """What the PET_* variables say, read as a fit reads them; None for one node.

    Raises:
        ConfigError: They contradict each other.
    """
    settings = launch_settings(1, Path(tempfile.gettempdir()), is_resumable=True)
    if settings.max_nodes == 1:
        return None
    host, port = parse_rendezvous_endpoint(settings.rdzv_endpoint, 29400)
    is_host = settings.rdzv_configs.get("is_host")
    if settings.rdzv_backend == "static":
        is_host = settings.rdzv_configs.get("rank") == 0
    variable = "PET_RDZV_ENDPOINT" if "PET_RDZV_ENDPOINT" in os.environ else "PET_MASTER_ADDR"
    return Endpoint(host, port, settings.min_nodes, is_host, variable)


def count_ranks(context: Context) -> int:
    """Processes of the whole job. Raises ConfigError."""
    if context.is_worker:
        return int(os.environ["WORLD_SIZE"])
    endpoint = find_endpoint()
    return context.processes * (endpoint.nodes if endpoint else 1)


def rendezvous(context: Context) -> Finding:
    """Whether the nodes reach node 0. Blocks for 10 s at most."""
    if not context.is_worker:
        return meet(find_endpoint())
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    addresses = _resolve(host, "MASTER_ADDR", _CONNECT_S)
    if isinstance(addresses, Finding):
        return addresses
    return Finding("ok", f"MASTER_ADDR {host} is {addresses[0]}", f"port {port}: see all-reduce")


def meet(endpoint: Endpoint | None, wait_s: float = _WAIT_S) -> Finding:
    """On node 0 listen for the others, on these connect to it. Blocks about `wait_s` at most.

    It listens on the port of the fit's own rendezvous, so that a port that is taken or closed shows
    while no GPU waits for it.
    """
    if endpoint is None:
        return skipped("one node: no rendezvous (PET_NNODES)")
    addresses = _resolve(endpoint.host, endpoint.variable, wait_s / 2)
    if isinstance(addresses, Finding):
        return addresses
    is_host = endpoint.is_host
    if any(map(is_local, addresses)) if is_host is None else is_host:
        return _listen(endpoint, wait_s)
    return _connect(endpoint, addresses[0], wait_s)


def _resolve(host: str, variable: str, wait_s: float) -> list[str] | Finding:
    """A name's addresses; a pod's name may take a moment to appear."""
    until_s = time.monotonic() + wait_s
    while True:
        try:
            return addresses_of(host)
        except (OSError, UnicodeError) as error:
            if time.monotonic() > until_s:
                return Finding(
                    "fail",
                    f"{variable}: the name {host} does not resolve ({error})",
                    "the nodes cannot find node 0",
                    f"correct {variable}; in Kubernetes it is POD.SERVICE of a headless Service "
                    "with publishNotReadyAddresses: true, and egress to port 53 must be allowed",
                )
            time.sleep(_PAUSE_S)


def _listen(endpoint: Endpoint, wait_s: float) -> Finding:
    others, port = endpoint.nodes - 1, endpoint.port
    connected: set[str] = set()
    try:
        server = listen(endpoint.host, port)
    except OSError as error:
        return Finding(
            "fail",
            f"cannot bind port {port} on node 0, this node ({error.strerror})",
            "the rendezvous cannot be hosted",
            f"stop the process that listens on port {port} (an earlier run?), or set another "
            f"port in {endpoint.variable} on all nodes",
        )
    with server:
        until_s = time.monotonic() + wait_s
        while len(connected) < others and (left_s := until_s - time.monotonic()) > 0:
            server.settimeout(left_s)
            with contextlib.suppress(TimeoutError):
                connection, peer = server.accept()
                connection.close()
                connected.add(f"{peer[0]}:{peer[1]}" if peer[0].startswith("127.") else peer[0])
    found = f"node 0 (this node): {endpoint} is free; {len(connected)} of {others} nodes connected"
    if len(connected) < others:
        return Finding("warn", found, "the others may not reach this node", _FIX_ALL_NODES)
    return Finding("ok", found, "the other nodes reach this node")


def _connect(endpoint: Endpoint, address: str, wait_s: float) -> Finding:
    until_s = time.monotonic() + wait_s
    while True:
        try:
            socket.create_connection((address, endpoint.port), _CONNECT_S).close()
            return Finding("ok", f"{endpoint} answers at {address}", "this node reaches node 0")
        except OSError as error:
            if time.monotonic() > until_s:
                is_silent = isinstance(error, TimeoutError)
                why = "no answer" if is_silent else (error.strerror or repr(error))
                found = f"{endpoint}, {address}: {why}"
                return Finding("fail", found, "this node cannot join node 0", _FIX_ALL_NODES)
            time.sleep(_PAUSE_S)
