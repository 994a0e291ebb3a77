"""Where nodes meet: what the PET_* variables say, and a rendezvous that answers in bounded time."""

import os
import time
import uuid
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.launcher.api import LaunchConfig

from lightship.errors import ConfigError, TimeoutExpired

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
    if given.standalone or (int(high or low) == 1 and not given.rdzv_endpoint):
        given.rdzv_backend, given.rdzv_endpoint = "c10d", "localhost:0"
        given.rdzv_id, given.local_addr = uuid.uuid4().hex, given.local_addr or "localhost"
    elif not given.rdzv_endpoint:
        if "PET_MASTER_ADDR" not in os.environ:
            raise ConfigError(
                f"PET_NNODES is {given.nnodes}: set PET_RDZV_ENDPOINT to HOST:PORT of node 0, the "
                "same on all nodes"
            )
        given.rdzv_endpoint = f"{given.master_addr}:{given.master_port or 29400}"
        is_host = given.node_rank == 0 if "PET_NODE_RANK" in os.environ else None
    given.master_port = given.master_port or 29500
    try:
        settings, _, _ = torchrun.config_from_args(given)
    except (ValueError, AssertionError, OSError) as error:  # it makes PET_LOG_DIR
        raise ConfigError(f"a PET_* variable is wrong: {error}") from None
    if is_host is not None and settings.rdzv_backend == "c10d":
        settings.rdzv_configs.setdefault("is_host", is_host)
    return settings


def open_rendezvous(settings: LaunchConfig) -> RendezvousHandler:
    """Connect to the rendezvous. Blocks until its host is up, for join_timeout at most.

    Raises:
        TimeoutExpired: The host did not come up.
    """
    parameters = RendezvousParameters(
        backend=settings.rdzv_backend,
        endpoint=settings.rdzv_endpoint,
        run_id=settings.run_id,
        min_nodes=settings.min_nodes,
        max_nodes=settings.max_nodes,
        local_addr=settings.local_addr,
        **settings.rdzv_configs,
    )
    wait_s = parameters.get_as_int("join_timeout", 600) or 600
    until = time.monotonic() + wait_s
    while True:
        try:
            handler = get_rendezvous_handler(parameters)
        except RendezvousConnectionError:
            if time.monotonic() > until:
                raise TimeoutExpired(
                    f"cannot connect to {settings.rdzv_endpoint} (PET_RDZV_ENDPOINT): node 0 did "
                    f"not start within {wait_s} s (join_timeout in PET_RDZV_CONF)"
                ) from None
            time.sleep(1)
            continue
        answer_s = 2 * (parameters.get_as_int("read_timeout", 60) or 60)
        _bound(handler, "num_nodes_waiting", answer_s)
        _bound(handler, "next_rendezvous", wait_s + answer_s)
        return handler


def _bound(handler: RendezvousHandler, name: str, bound_s: float) -> None:
    """Bound a call of the rendezvous; when time is up it fails as if the host were gone.

    Torch's client waits without bound for a host that is frozen or cut off: after its time-out it
    cancels the request, and waits for the answer to that.
    """
    call = getattr(handler, name)

    def bounded() -> Any:
        answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

        def ask() -> None:
            try:
                answers.put((call(), None))
            except BaseException as error:
                answers.put((None, error))

        Thread(target=ask, daemon=True).start()
        try:
            answer, error = answers.get(timeout=bound_s)
        except Empty:
            raise RendezvousConnectionError(f"no answer within {bound_s:.0f} s") from None
        if error is not None:
            raise error
        return answer

    setattr(handler, name, bounded)
