"""Whether the nodes can find each other: the rendezvous's name and its port."""

import contextlib
import os
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lightship.doctor.check import Finding, skipped

_TRY_S = 2.0
_PAUSE_S = 0.3
_FIX_ALL_NODES = (
    "start the doctor on all nodes at once (it listens on node 0), give PET_RDZV_ENDPOINT (or "
    "MASTER_ADDR and MASTER_PORT) the name and port of node 0, and let the port through firewall "
    "and NetworkPolicy"
)


@dataclass(frozen=True)
class Meeting:
    """Where the nodes meet.

    Attributes:
        host: Name or address of node 0.
        port: Of the rendezvous.
        nodes: Of the job.
        is_host: Whether this is node 0; None: its name tells.
        told_by: The variables that say so.
    """

    host: str
    port: int
    nodes: int
    is_host: bool | None
    told_by: str


def find_meeting() -> Meeting | None:
    """What the PET_* variables say, read as a fit reads them; None for one node.

    Raises:
        ConfigError: They do not fit together.
    """
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    from lightship.distributed.elastic_agent import launch_settings

    settings = launch_settings(1, Path(tempfile.gettempdir()), is_resumable=True)
    if settings.max_nodes == 1:
        return None
    host, port = parse_rendezvous_endpoint(settings.rdzv_endpoint, 29400)
    is_host = settings.rdzv_configs.get("is_host")
    if settings.rdzv_backend == "static":
        is_host = settings.rdzv_configs.get("rank") == 0
    told_by = "PET_RDZV_ENDPOINT" if "PET_RDZV_ENDPOINT" in os.environ else "PET_MASTER_ADDR"
    return Meeting(host, port, settings.min_nodes, is_host, told_by)


def under_a_launcher() -> Finding:
    """For a process that a launcher has started: whether MASTER_ADDR has an address."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    addresses = _addresses(host, "MASTER_ADDR", _TRY_S)
    if isinstance(addresses, Finding):
        return addresses
    return Finding("ok", f"MASTER_ADDR {host} is {addresses[0]}", f"port {port}: see all-reduce")


def meet(meeting: Meeting | None, wait_s: float = 10.0) -> Finding:
    """On node 0 listen for the others, on these knock there. Blocks for `wait_s` at most.

    The doctor listens where the fit's own rendezvous will, so that a port that is taken or closed
    shows while no GPU waits for it.
    """
    if meeting is None:
        return skipped("one node: nobody to meet (PET_NNODES)")
    addresses = _addresses(meeting.host, meeting.told_by, wait_s / 2)
    if isinstance(addresses, Finding):
        return addresses
    is_host = any(map(_is_here, addresses)) if meeting.is_host is None else meeting.is_host
    look = _listen if is_host else _knock
    return look(meeting, addresses[0], wait_s)


def _addresses(host: str, variable: str, wait_s: float) -> list[str] | Finding:
    """A name's addresses; a pod's name may take a moment to appear."""
    until = time.monotonic() + wait_s
    while True:
        try:
            return sorted({info[4][0] for info in socket.getaddrinfo(host, None)})  # type: ignore[misc]
        except (OSError, UnicodeError) as error:
            if time.monotonic() > until:
                return Finding(
                    "fail",
                    f"{variable}: the name {host} does not resolve ({error})",
                    "no node finds node 0",
                    f"correct {variable}; in Kubernetes it is POD.SERVICE of a headless Service "
                    "with publishNotReadyAddresses: true, and egress to port 53 must be allowed",
                )
            time.sleep(_PAUSE_S)


def _is_here(address: str) -> bool:
    """Whether an address is one of this machine's: only then can it be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _listen(meeting: Meeting, address: str, wait_s: float) -> Finding:
    at, others = f"{meeting.host}:{meeting.port} ({meeting.told_by})", meeting.nodes - 1
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", meeting.port))
        except OSError as error:
            return Finding(
                "fail",
                f"this is node 0, and port {meeting.port} cannot be had here ({error.strerror})",
                "the rendezvous cannot be hosted",
                f"stop what listens on port {meeting.port} (an earlier run?), or give another port "
                f"in {meeting.told_by} on all nodes",
            )
        server.listen(others)
        came: set[str] = set()
        until = time.monotonic() + wait_s
        while len(came) < others and (left_s := until - time.monotonic()) > 0:
            server.settimeout(left_s)
            with contextlib.suppress(TimeoutError):
                connection, peer = server.accept()
                connection.close()
                came.add(peer[0] if not peer[0].startswith("127.") else f"{peer[0]}:{peer[1]}")
    told = f"this is node 0: {at} is free here; {len(came)} of {others} other nodes came"
    if len(came) < others:
        return Finding("warn", told, "not known whether the others reach this node", _FIX_ALL_NODES)
    return Finding("ok", told, "the others reach this node")


def _knock(meeting: Meeting, address: str, wait_s: float) -> Finding:
    until = time.monotonic() + wait_s
    while True:
        left_s = until - time.monotonic()
        try:
            socket.create_connection((address, meeting.port), max(0.1, min(_TRY_S, left_s))).close()
        except OSError as error:
            if time.monotonic() < until:
                time.sleep(_PAUSE_S)
                continue
            why = "silence" if isinstance(error, TimeoutError) else (error.strerror or repr(error))
            return Finding(
                "fail",
                f"{meeting.host}:{meeting.port} ({meeting.told_by}), {address}: {why}",
                "this node cannot join node 0",
                _FIX_ALL_NODES,
            )
        told = f"{meeting.host}:{meeting.port} ({meeting.told_by}) answers at {address}"
        return Finding("ok", told, "this node reaches node 0")
