"""Torch's store, served on no more addresses than its clients need.

`TCPStore` alone listens on all interfaces, and it has no password: whoever reaches its port reads
and writes all of its keys. Nothing that comes from it is unpickled, here or in rendezvous.py.
"""

import contextlib
import logging
import os
import socket
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from lightship.errors import TimeoutExpired

logger = logging.getLogger(__name__)


def open_store(timeout_s: float) -> tuple[dist.Store, int, int]:
    """The store that torchrun's variables describe, served by rank 0. Every rank, once; blocks.

    On one node everything stays on the loopback interface, also what gloo and NCCL open later.

    Returns:
        (the store, rank, world size)

    Raises:
        TimeoutExpired: The port is taken.
        DistError: The others have not come.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_one_node = world_size == int(os.environ["LOCAL_WORLD_SIZE"])
    if is_one_node:
        stay_on_loopback()
    timeout = timedelta(seconds=timeout_s)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun serves it
        return next(rendezvous("env://", timeout=timeout))
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if is_one_node:
        host = loopback()
    if rank == 0:
        return serve(host, port, timeout, _remedy(), world_size), rank, world_size
    return dist.TCPStore(host, port, world_size, False, timeout), rank, world_size


def _remedy() -> str:
    """What to change if the port of the workers' store is taken."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "another process has just taken it; the next start chooses another port"
    return (
        "MASTER_ADDR:MASTER_PORT must be free on the node of rank 0: end what listens there, or "
        "set another MASTER_PORT, the same for all ranks"
    )


def serve(
    host: str, port: int, timeout: timedelta, remedy: str, clients: int | None = None
) -> dist.TCPStore:
    """A store at the address that `host` names on this node. Blocks until `clients` have come.

    Args:
        host: A name or address by which all clients reach this node.
        port: To listen on.
        timeout: Of each call.
        remedy: What helps if the port is taken, for the error.
        clients: To wait for, this process included; None: wait for none.

    Raises:
        TimeoutExpired: This process cannot listen there; the port may be free at the next start.
        DistError: The clients have not come.
    """
    try:
        listener = listen(host, port)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        raise TimeoutExpired(f"cannot listen at {host}:{port} ({why}); {remedy}") from error
    return dist.TCPStore(
        host, port, clients, True, timeout, clients is not None,
        multi_tenant=True, master_listen_fd=listener.detach(),
    )  # fmt: skip


def is_local(address: str) -> bool:
    """Whether an address is one of this machine's: only those can be bound."""
    with socket.socket(_family(address)) as probe, contextlib.suppress(OSError):
        probe.bind((address, 0))
        return True
    return False


def addresses_of(host: str) -> list[str]:
    """All addresses of a name. Raises OSError or UnicodeError."""
    return sorted({str(info[4][0]) for info in socket.getaddrinfo(host, None)})


def loopback() -> str:
    """This node's address that no other node reaches."""
    return "127.0.0.1" if is_local("127.0.0.1") else "::1"


def stay_on_loopback() -> None:
    """Have gloo and NCCL listen on the loopback interface, unless told otherwise."""
    names = {name for _, name in socket.if_nameindex()}
    for name in sorted(names & {"lo", "lo0"}):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at the address that `host` names on this node. Raises OSError."""
    here = _address_here(host)
    if here:
        return socket.create_server((here, port), family=_family(here))
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=both)


def _address_here(host: str) -> str:
    """The address to listen on; "": all, where `host` names none that other nodes reach too."""
    try:
        local = [address for address in addresses_of(host) if is_local(address)]
    except (OSError, UnicodeError):
        local = []
    # Some systems give their own host name an address of the loopback interface (127.0.1.1).
    is_meant = host == "localhost" or host in local
    reached = [a for a in local if is_meant or not (a.startswith("127.") or a == "::1")]
    if not reached:
        logger.warning(f"{host} is not an address of this node: listening on all interfaces")
    return min(reached, key=lambda address: ":" in address, default="")


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
