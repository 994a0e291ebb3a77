"""One node's agent: torch elastic's, which starts lightship once a device and keeps exit codes.

Only this module and rendezvous_state.py use private names of torch elastic. Whatever waits here has
a bound: missing nodes (join_timeout), silent agents (keep_alive_interval x keep_alive_max_attempt),
a silent host, or a node lost while ranks are assigned (read_timeout), workers that do not stop
(TORCH_ELASTIC_SHUTDOWN_TIMEOUT).
"""

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.agent.server import (
    RunResult,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException, SubprocessContext
from torch.distributed.elastic.rendezvous import (
    RendezvousError,
    RendezvousHandler,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig

from lightship.distributed import comm
from lightship.distributed.arguments import hide
from lightship.distributed.rendezvous import answer_s, ask, launch_settings, open_rendezvous
from lightship.distributed.rendezvous_state import StateRefused
from lightship.distributed.signals import Phase, stop_signals, stopped
from lightship.distributed.worker_logs import (
    FINAL,
    PREEMPTED,
    WorkerFailed,
    WorkerLogs,
    first_failure,
    how_it_ended,
    is_known,
)
from lightship.errors import PeerLost, TimeoutExpired

logger = logging.getLogger(__name__)
PRIVATE_NAMES = (
    "_assign_worker_ranks", "_exit_barrier", "_exit_barrier_timeout", "_monitor_workers",
    "_pcontext", "_remaining_restarts", "_shutdown", "_stop_workers",
)  # fmt: skip
"""Attributes of torch's LocalElasticAgent that `_Agent` overrides or uses."""
_RENDEZVOUS_CACHE_S = 1.1  # torch answers from what it read within the last second
DEFAULTS = {
    # Below Kubernetes' default grace of 30 s, which would kill the agent before its last line.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "25",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_BUFFER_SIZE": "2000",
}


def run_agent(processes: int, arguments: Sequence[str], resumes_from: str | None) -> None:
    """Run `python -m lightship arguments` so many times here, with the other nodes. Blocks.

    Args:
        processes: Workers on this node.
        arguments: Of each worker.
        resumes_from: What a restart resumes from, in words; None: from scratch, so that there are
            no restarts unless PET_MAX_RESTARTS says so.

    Raises:
        LightshipError: A worker failed, a peer was lost, a wait expired or a signal asks to stop.
    """
    _set_environment(processes)
    log_path = Path(os.environ.get("PET_LOG_DIR") or tempfile.mkdtemp(prefix="lightship-"))
    settings = launch_settings(processes, log_path, resumes_from is not None)
    logs = WorkerLogs(log_path, processes)
    handler = open_rendezvous(settings)
    agent = _build_agent(settings, handler, logs, arguments, resumes_from or "the beginning")
    is_over = False
    try:
        result = agent.run()
        if result is None:
            raise PeerLost("this node was excluded from the rendezvous")
        if result.is_failed():
            raise logs.failure(result)
        is_over = True
    except SignalException as error:
        raise stopped(error.sigval, Phase.AGENT, logs.message(0)) from None
    except RendezvousTimeoutError:
        raise TimeoutExpired(
            f"fewer than {settings.min_nodes} nodes (PET_NNODES) joined {settings.rdzv_endpoint} "
            "within join_timeout (PET_RDZV_CONF)"
        ) from None
    except StateRefused:
        raise
    except RendezvousError as error:
        raise PeerLost(f"lost the rendezvous at {settings.rdzv_endpoint}: {error}") from None
    except WorkerFailed as error:
        is_over = error.exit_code in FINAL
        raise
    finally:
        # A closed rendezvous never opens again: only where nobody shall come back.
        if is_over:
            with contextlib.suppress(RendezvousError):  # its host is gone: nobody meets there
                handler.shutdown()
        if "PET_LOG_DIR" not in os.environ and not logs.is_needed:
            shutil.rmtree(log_path, ignore_errors=True)


def _set_environment(processes: int) -> None:
    """Variables that torch elastic and the workers read, where they are not set."""
    handled = (*stop_signals(), signal.SIGQUIT)
    names = ",".join(signal.Signals(number).name for number in handled)
    threads = max(1, comm.node_cores() // processes)
    own = {"TORCHELASTIC_SIGNALS_TO_HANDLE": names, "OMP_NUM_THREADS": str(threads)}
    for name, value in (DEFAULTS | own).items():
        os.environ.setdefault(name, value)
    # Shared across restarts, torch's store loses keys of the new attempt and hangs it.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # This module says the same, shorter.
    logging.getLogger("torch.distributed.elastic").addHandler(logging.NullHandler())
    logging.getLogger("torch.distributed.elastic").propagate = False


def _build_agent(
    settings: LaunchConfig,
    handler: RendezvousHandler,
    logs: WorkerLogs,
    arguments: Sequence[str],
    resumes_from: str,
) -> LocalElasticAgent:
    """`_Agent`, or torch's own where torch has no longer what it needs."""
    spec = WorkerSpec(
        role="rank",
        local_world_size=settings.nproc_per_node,
        entrypoint=sys.executable,
        args=("-P", "-m", "lightship", *hide(arguments)),
        rdzv_handler=handler,
        max_restarts=settings.max_restarts,
        monitor_interval=settings.monitor_interval,
        local_addr=settings.local_addr,
        numa_options=settings.numa_options,
    )
    if settings.rdzv_backend == "static":
        spec.master_addr, spec.master_port = parse_rendezvous_endpoint(settings.rdzv_endpoint, -1)
    stop_s = settings.shutdown_timeout or 0
    stock = LocalElasticAgent(spec, logs, shutdown_timeout=stop_s)
    if missing := [name for name in PRIVATE_NAMES if not hasattr(stock, name)]:
        logger.warning(
            f"restarting workers as torchrun does: LocalElasticAgent of torch {torch.__version__} "
            f"has no {', '.join(missing)}"
        )
        return stock
    return _Agent(spec, logs, stop_s, settings.max_nodes, resumes_from, answer_s(settings))


class _Agent(LocalElasticAgent):
    """Torch's agent, except for when it restarts and how long it waits for others.

    It does not restart where that cannot help: after a wrong command, configuration or data, a
    stop request, or the same error as last time.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        logs: WorkerLogs,
        stop_s: int,
        max_nodes: int,
        resumes_from: str,
        silent_s: float,
    ) -> None:
        super().__init__(spec, logs, shutdown_timeout=stop_s)
        self.logs, self.stop_s = logs, stop_s
        self.max_nodes, self.resumes_from, self.silent_s = max_nodes, resumes_from, silent_s
        self.last_message = ""

    def _assign_worker_ranks(self, *arguments: Any) -> list[Worker]:
        """Torch's. Raises RendezvousConnectionError where a node is lost after it has joined."""
        return ask(self.silent_s, partial(super()._assign_worker_ranks, *arguments))

    def _exit_barrier(self) -> None:
        """Torch's, which goes on without nodes that are late; also without a host that is frozen.

        All workers here have finished.
        """
        with contextlib.suppress(RendezvousError):
            ask(self._exit_barrier_timeout + self.silent_s, super()._exit_barrier)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown(timeout=self.stop_s)

    def _is_node_waiting(self, worker_group: WorkerGroup) -> bool:
        """Whether a node waits to join (none can where all have come)."""
        if (worker_group.group_world_size or 1) >= self.max_nodes:
            return False
        time.sleep(_RENDEZVOUS_CACHE_S)
        return worker_group.spec.rdzv_handler.num_nodes_waiting() > 0

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        assert isinstance(self._pcontext, SubprocessContext)
        handlers = self._pcontext.subprocess_handlers.values()
        if any(handler.proc.poll() for handler in handlers):
            # One has failed: end the others. (Torch's own call waits 30 s, whatever was asked.)
            self._pcontext.close(signal.SIGTERM, self.stop_s)
        result = super()._monitor_workers(worker_group)
        if not result.is_failed():
            return result
        rank, failure = first_failure(result)
        if failure.exitcode == PREEMPTED and self._is_node_waiting(worker_group):
            # Stopped by a node that makes room for a new one: torch then restarts, uncounted.
            return RunResult(state=WorkerState.HEALTHY)
        is_final = failure.exitcode in FINAL | {PREEMPTED, -signal.SIGTERM}
        if is_final or self.logs.is_taken_over(result):
            self._remaining_restarts = 0  # a restart does not help, or would take the run back
        elif self._remaining_restarts:
            message = self.logs.message(failure.local_rank)
            if message and message == self.last_message and not is_known(failure.exitcode):
                self._remaining_restarts = 0
                return result
            self.last_message = message
            logger.warning(
                f"rank {rank} {how_it_ended(failure, message)}; restarting all ranks from "
                f"{self.resumes_from}, {self._remaining_restarts} restarts left"
            )
        return result
