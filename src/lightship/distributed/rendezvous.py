"""Where nodes meet: what the PET_* variables say, and a rendezvous that answers in bounded time."""

import logging
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import (
    C10dRendezvousBackend,
    create_backend,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig

from lightship.distributed.bounded import NoAnswer, call_within
from lightship.distributed.rendezvous_state import (
    SECRET,
    SECRET_FILE,
    SignedState,
    StateRefused,
    run_secret,
)
from lightship.distributed.store import addresses_of, is_local, loopback, serve
from lightship.errors import ConfigError, TimeoutExpired, in_one_line

T = TypeVar("T")
logger = logging.getLogger(__name__)
_PORT = 29400
_NUMBERS = (
    "close_timeout", "heartbeat_timeout", "join_timeout", "keep_alive_interval",
    "keep_alive_max_attempt", "last_call_timeout", "read_timeout", "timeout",
)  # fmt: skip
"""Of PET_RDZV_CONF."""
_MAX_NUMBER = 10**8
MAX_RESTARTS = 3
"""Default of PET_MAX_RESTARTS where work resumes; torchrun's own 0 suits scripts that cannot."""


def launch_settings(processes: int, log_path: Path, is_resumable: bool) -> LaunchConfig:
    """The PET_* variables, parsed by torchrun, with lightship's defaults.

    Args:
        processes: Workers on this node.
        log_path: Folder for the workers' output.
        is_resumable: Whether a restart resumes rather than starts from scratch.

    Raises:
        ConfigError: A variable is wrong or missing.
    """
    given = torchrun.parse_args(["lightship"])
    given.nproc_per_node, given.log_dir = str(processes), str(log_path)
    if is_resumable and "PET_MAX_RESTARTS" not in os.environ:
        given.max_restarts = MAX_RESTARTS
    low, _, high = given.nnodes.partition(":")
    if not (low + (high or low)).isdecimal() or not 0 < int(low) <= int(high or low):
        raise ConfigError(f"PET_NNODES is '{given.nnodes}'; it must be N or MIN:MAX")
    is_host = None
    if "PET_RDZV_BACKEND" not in os.environ:
        given.rdzv_backend = "c10d"  # torchrun's default, static, cannot replace a lost node
    if given.rdzv_backend == "etcd-v2":
        raise ConfigError(
            "PET_RDZV_BACKEND etcd-v2 is not supported (it unpickles what its server holds); "
            "use c10d"
        )
    if given.standalone or int(high or low) == 1:
        # It meets itself: see `open_rendezvous`.
        given.nnodes, given.rdzv_backend, given.rdzv_endpoint = "1", "c10d", "this node"
        given.rdzv_id, given.local_addr = uuid.uuid4().hex, loopback()
    elif not given.rdzv_endpoint:
        if "PET_MASTER_ADDR" not in os.environ:
            raise ConfigError(
                f"PET_NNODES is {given.nnodes}: set PET_RDZV_ENDPOINT to HOST:PORT of node 0, the "
                "same on all nodes"
            )
        given.rdzv_endpoint = f"{given.master_addr}:{given.master_port or _PORT}"
        is_host = given.node_rank == 0 if "PET_NODE_RANK" in os.environ else None
    given.master_port = given.master_port or 29500
    try:
        settings, _, _ = torchrun.config_from_args(given)
    except (ValueError, AssertionError, OSError) as error:  # it makes PET_LOG_DIR
        raise ConfigError(f"a PET_* variable is wrong: {error}") from None
    if is_host is not None and settings.rdzv_backend == "c10d":
        settings.rdzv_configs.setdefault("is_host", is_host)
    _check(settings)
    return settings


def _check(settings: LaunchConfig) -> None:
    """Raise ConfigError for values that torch reads only when the rendezvous is opened."""
    given = _parameters(settings)
    for name in _NUMBERS:
        value = str(given.get(name, 1))
        if not value.isdecimal() or not 0 < int(value) <= _MAX_NUMBER:
            raise ConfigError(
                f"PET_RDZV_CONF has {name}={value}; it must be a whole number from 1 to "
                f"{_MAX_NUMBER}"
            )
    try:
        given.get_as_bool("is_host")
    except ValueError:
        raise ConfigError(
            f"PET_RDZV_CONF has is_host={given.get('is_host')}; it must be true or false"
        ) from None
    is_address = given.backend in ("c10d", "static") and given.get("store_type") != "file"
    if settings.max_nodes == 1 or not is_address:
        return
    try:
        default = -1 if given.backend == "static" else _PORT
        _, port = parse_rendezvous_endpoint(given.endpoint, default)
    except ValueError:
        port = -1
    if port < 1:
        raise ConfigError(
            f"{_endpoint_variables()} is '{given.endpoint}'; it must be HOST:PORT with a port from "
            "1 to 65535"
        )


def _endpoint_variables() -> str:
    """The variables that set where the nodes meet."""
    is_endpoint = "PET_RDZV_ENDPOINT" in os.environ
    return "PET_RDZV_ENDPOINT" if is_endpoint else "PET_MASTER_ADDR:PET_MASTER_PORT"


def _remedy() -> str:
    """What to change if the port of the rendezvous is taken."""
    return (
        f"{_endpoint_variables()} must be free on node 0: end what listens there, or set another "
        "port, the same on all nodes"
    )


def answer_s(settings: LaunchConfig) -> float:
    """Seconds within which the rendezvous' host and the other nodes answer, or are lost."""
    return 2.0 * (_parameters(settings).get_as_int("read_timeout", 60) or 60)


def _parameters(settings: LaunchConfig) -> RendezvousParameters:
    return RendezvousParameters(
        backend=settings.rdzv_backend,
        endpoint=settings.rdzv_endpoint,
        run_id=settings.run_id,
        min_nodes=settings.min_nodes,
        max_nodes=settings.max_nodes,
        local_addr=settings.local_addr,
        **settings.rdzv_configs,
    )


def open_rendezvous(settings: LaunchConfig) -> RendezvousHandler:
    """Connect to the rendezvous. Blocks until its host is up, for join_timeout at most.

    Raises:
        TimeoutExpired: The host did not come up.
        StateRefused: Another run's host stayed.
        ConfigError: There is no such kind of rendezvous.
    """
    parameters = _parameters(settings)
    wait_s = parameters.get_as_int("join_timeout", 600) or 600
    until = time.monotonic() + wait_s
    open_handler = _opener(settings, parameters)
    is_told = False
    while True:
        try:
            handler = open_handler()
        except StateRefused as refused:
            # The host of an earlier start, whose name the new one will have, may still be ending.
            if time.monotonic() > until:
                raise
            if not is_told:
                logger.warning(f"{refused}; retrying for up to {wait_s} s")
            is_told = True
            time.sleep(1)
            continue
        except RendezvousConnectionError as error:
            if time.monotonic() > until:
                within = f"within {wait_s} s (join_timeout in PET_RDZV_CONF)"
                if isinstance(error.__cause__, TimeoutExpired):  # this is node 0
                    raise TimeoutExpired(f"{error.__cause__}; not free {within}") from None
                raise TimeoutExpired(
                    f"cannot connect to {settings.rdzv_endpoint} (PET_RDZV_ENDPOINT): node 0 did "
                    f"not start {within}"
                ) from None
            time.sleep(1)
            continue
        silent_s = answer_s(settings)
        for name, bound_s in (
            ("num_nodes_waiting", silent_s),
            ("next_rendezvous", wait_s + silent_s),
            ("shutdown", silent_s),
        ):
            setattr(handler, name, partial(ask, bound_s, getattr(handler, name)))
        return handler


def _opener(
    settings: LaunchConfig, parameters: RendezvousParameters
) -> Callable[[], RendezvousHandler]:
    """What connects to the rendezvous, once a call."""
    if settings.rdzv_backend == "static":
        return partial(_open_static, parameters)
    if settings.rdzv_backend != "c10d":
        return partial(_open_registered, parameters)
    if settings.max_nodes == 1:
        return partial(_open_on_one_node, parameters)
    secret = run_secret()
    if not secret:
        logger.warning(
            f"no secret for {settings.max_nodes} nodes: whoever reaches {settings.rdzv_endpoint} "
            f"can join or disturb this run. Set {SECRET}, or {SECRET_FILE}, to the same random "
            "text on all nodes"
        )
    return partial(_open_c10d, parameters, secret)


def _open_on_one_node(parameters: RendezvousParameters) -> RendezvousHandler:
    """This agent meets itself, within its memory: nothing listens."""
    store = dist.HashStore()
    return create_handler(store, C10dRendezvousBackend(store, parameters.run_id), parameters)


def _open_c10d(parameters: RendezvousParameters, secret: str) -> RendezvousHandler:
    """Torch's c10d rendezvous, with a state that is signed and no pickle."""
    if parameters.get("store_type", "tcp") == "file":
        backend, store = create_backend(parameters)
    else:
        store = _tcp_store(parameters)
        backend = C10dRendezvousBackend(store, parameters.run_id)
    signed = SignedState(backend, parameters.run_id, secret, parameters.endpoint)
    signed.get_state()  # raises StateRefused for another run's
    return create_handler(store, signed, parameters)


def _tcp_store(parameters: RendezvousParameters) -> dist.Store:
    """The store that all nodes use, served here if this is node 0.

    Raises:
        RendezvousConnectionError: Nothing listens there yet, or its port is taken.
    """
    host, port = parse_rendezvous_endpoint(parameters.endpoint, _PORT)
    timeout = timedelta(seconds=parameters.get_as_int("read_timeout", 60) or 60)
    is_host = parameters.get_as_bool("is_host")
    try:
        if is_host or (is_host is None and any(map(is_local, addresses_of(host)))):
            try:
                return serve(host, port, timeout, _remedy())
            except OSError:  # taken: by another agent on this machine?
                if is_host:
                    raise
        return dist.TCPStore(host, port, is_master=False, timeout=timeout)
    except (OSError, RuntimeError, ValueError) as error:
        raise RendezvousConnectionError(f"cannot connect to {parameters.endpoint}") from error


def _open_registered(parameters: RendezvousParameters) -> RendezvousHandler:
    """A rendezvous that is torch's own or registered with it. Raises ConfigError."""
    try:
        return get_rendezvous_handler(parameters)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"PET_RDZV_BACKEND is '{parameters.backend}'; it must be c10d or another that is "
            f"installed: {error}"
        ) from None


def _open_static(parameters: RendezvousParameters) -> RendezvousHandler:
    """Torch's static rendezvous; its store is served as all others are."""
    handler: Any = get_rendezvous_handler(parameters)
    if parameters.config.get("rank") == 0:
        host, port = parse_rendezvous_endpoint(parameters.endpoint, -1)
        timeout = timedelta(seconds=600)
        handler._store = serve(host, port, timeout, _remedy(), parameters.max_nodes)
    return handler


def ask(bound_s: float, call: Callable[[], T]) -> T:
    """The result of a call of the rendezvous or its store, within `bound_s`. Blocks.

    Raises:
        RendezvousConnectionError: The host, or a node that the call waits for, is gone or frozen.
    """
    try:
        return call_within(bound_s, call)
    except NoAnswer as error:
        raise RendezvousConnectionError(str(error)) from None
    except dist.DistError as error:
        raise RendezvousConnectionError(in_one_line(error)) from None
