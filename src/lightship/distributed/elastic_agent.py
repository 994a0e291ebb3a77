"""One node's agent: torch elastic's, started on ourselves, with exit codes that keep their meaning.

Whatever waits here has a bound: nodes that do not come (join_timeout), silent agents
(keep_alive_interval x keep_alive_max_attempt), a silent host (read_timeout), workers that do not
stop (shutdown timeout).
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    LogsDest,
    SignalException,
    Std,
    SubprocessContext,
)
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig

from lightship.distributed import comm
from lightship.distributed.signals import RESPONSES, Phase, stop_signals
from lightship.errors import (
    EXIT_CODES,
    ConfigError,
    LightshipError,
    PeerLost,
    Preempted,
    TimeoutExpired,
)

_FINAL = {EXIT_CODES[name].code for name in ("usage", "data", "diverged", "config")}
_PREEMPTED, _PEER_LOST = EXIT_CODES["preempted"].code, EXIT_CODES["peer_lost"].code
_KNOWN = {row.code for row in EXIT_CODES.values() if row.code}
_MAX_RESTARTS = 3  # torchrun's own 0 suits scripts that cannot resume
_TAIL_LINES = 20
_RENDEZVOUS_CACHE_S = 1.1  # torch answers from what it read within the last second
_DEFAULTS = {
    # Shared across restarts, torch's store loses keys of the new attempt and hangs it.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    # Below Kubernetes' default grace of 30 s, which would kill the agent before its last word.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "25",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_BUFFER_SIZE": "2000",
}


class WorkerFailed(LightshipError):
    """A worker ended in a way that no restart mended; the agent ends with its code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self._code = code

    @property
    def exit_code(self) -> int:
        """The worker's code if it is one of the contract, else 1."""
        return self._code if self._code in _KNOWN else 1


def run_agent(processes: int, arguments: Sequence[str], goes_on_from: str | None) -> None:
    """Run `python -m lightship arguments` so many times here, with the other nodes. Blocks.

    Args:
        processes: Workers on this node.
        arguments: Of each worker.
        goes_on_from: What a restart goes on from, in words; None: a crash is not mended by one,
            unless PET_MAX_RESTARTS says.

    Raises:
        LightshipError: A worker failed, a peer was lost, a wait expired or somebody asked to stop.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    handled = (*stop_signals(), signal.SIGQUIT)
    names = ",".join(signal.Signals(number).name for number in handled)
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", names)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, comm.node_cores() // processes)))
    # What these loggers tell, this file tells in the user's words.
    logging.getLogger("torch.distributed.elastic").addHandler(logging.NullHandler())
    logging.getLogger("torch.distributed.elastic").propagate = False
    log_path = Path(os.environ.get("PET_LOG_DIR") or tempfile.mkdtemp(prefix="lightship-"))
    settings = launch_settings(processes, log_path, goes_on_from is not None)
    logs = _Logs(log_path, processes)
    handler = _rendezvous(settings)
    spec = WorkerSpec(
        role="rank",
        local_world_size=processes,
        entrypoint=sys.executable,
        args=("-m", "lightship", *arguments),
        rdzv_handler=handler,
        max_restarts=settings.max_restarts,
        monitor_interval=settings.monitor_interval,
        local_addr=settings.local_addr,
        numa_options=settings.numa_options,
    )
    if settings.rdzv_backend == "static":
        spec.master_addr, spec.master_port = parse_rendezvous_endpoint(settings.rdzv_endpoint, -1)
    agent = _Agent(spec, logs, shutdown_timeout=settings.shutdown_timeout or 0)
    agent.max_nodes = settings.max_nodes
    agent.goes_on_from = goes_on_from or "the beginning"
    is_over = False
    try:
        result = agent.run()
        if result is None:
            raise PeerLost("the other nodes went on without this one")
        if result.is_failed():
            raise logs.told(result)
        is_over = True
    except SignalException as error:
        raise Preempted(logs.message(0) or RESPONSES[Phase.AGENT].text(error.sigval)) from None
    except RendezvousTimeoutError:
        raise TimeoutExpired(
            f"fewer than {settings.min_nodes} nodes (PET_NNODES) came to {settings.rdzv_endpoint} "
            "within join_timeout (PET_RDZV_CONF)"
        ) from None
    except RendezvousError as error:
        raise PeerLost(f"lost the other nodes at {settings.rdzv_endpoint}: {error}") from None
    except WorkerFailed as error:
        is_over = error.exit_code in _FINAL
        raise
    finally:
        # A closed rendezvous never opens again: only where nobody shall come back.
        if is_over:
            handler.shutdown()
        if "PET_LOG_DIR" not in os.environ and not logs.is_wanted:
            shutil.rmtree(log_path, ignore_errors=True)


def launch_settings(processes: int, log_path: Path, is_resumable: bool) -> LaunchConfig:
    """What the PET_* variables say, read by torchrun's own parser, with our defaults."""
    given = torchrun.parse_args(["lightship"])
    given.nproc_per_node, given.log_dir = str(processes), str(log_path)
    if is_resumable and "PET_MAX_RESTARTS" not in os.environ:
        given.max_restarts = _MAX_RESTARTS
    low, _, high = given.nnodes.partition(":")
    if not (low + (high or low)).isdecimal() or not 0 < int(low) <= int(high or low):
        raise ConfigError(f"PET_NNODES is '{given.nnodes}'; it must be N or MIN:MAX")
    is_host = None
    if "PET_RDZV_BACKEND" not in os.environ:
        given.rdzv_backend = "c10d"  # torchrun's default cannot lose a node and go on
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


def _rendezvous(settings: LaunchConfig) -> RendezvousHandler:
    """The meeting point of the nodes. Blocks, up to join_timeout, until its host is up."""
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
                    f"nobody answers at {settings.rdzv_endpoint} (PET_RDZV_ENDPOINT): node 0 did "
                    f"not come within {wait_s} s (join_timeout in PET_RDZV_CONF)"
                ) from None
            time.sleep(1)
            continue
        answer_s = 2 * (parameters.get_as_int("read_timeout", 60) or 60)
        _bound(handler, "num_nodes_waiting", answer_s)
        _bound(handler, "next_rendezvous", wait_s + answer_s)
        return handler


def _bound(handler: RendezvousHandler, name: str, bound_s: float) -> None:
    """Give a call of the rendezvous an end; it fails as if its host were gone.

    Torch's client waits without bound for a host that is frozen or cut off: after its time-out it
    takes the question back, and waits for the answer to that.
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


class _Logs(DefaultLogsSpecs):
    """Where workers leave words: local rank 0 on the console, the others in a folder."""

    def __init__(self, path: Path, processes: int) -> None:
        super().__init__(str(path), dict.fromkeys(range(1, processes), Std.ALL))
        self.is_wanted = False
        self._last: LogsDest | None = None

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Torch's own places, remembered."""
        self._last = super().reify(envs)
        return self._last

    def message(self, local_rank: int) -> str:
        """The line a worker of the last attempt left at its end, or ''."""
        if self._last is None:
            return ""
        path = Path(self._last.error_files[local_rank])
        failure = ProcessFailure(local_rank, 0, 0, str(path)) if path.is_file() else None
        return str(failure.error_file_data["message"]) if failure else ""

    def told(self, result: RunResult) -> WorkerFailed:
        """The failure that caused the others, with its last lines if nobody has seen them."""
        rank, failure = first_failure(result)
        code, said = failure.exitcode, self.message(failure.local_rank)
        if code == -signal.SIGTERM:  # before it could listen to it
            code, said = _PREEMPTED, "stopped by SIGTERM before training began"
        if code in _KNOWN:
            where = "" if code in _FINAL | {_PREEMPTED} else f"rank {rank}: "
            return WorkerFailed(f"{where}{said or f'a worker ended with code {code}'}", code)
        text = f"rank {rank} failed first, {how_it_ended(failure, said)}"
        assert self._last is not None
        output = self._last.stderrs[failure.local_rank]
        if output:
            self.is_wanted = True
            lines = Path(output).read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            text += "".join(f"\n[rank {rank}] {line}" for line in lines)
            text += f"\nall it said: {output}"
        return WorkerFailed(text, code)


def first_failure(result: RunResult) -> tuple[int, ProcessFailure]:
    """(rank, failure) of the worker that is to blame: what follows from another's end comes last.

    Torch has times in whole seconds, in which all of them end.
    """
    consequences = [-signal.SIGKILL, _PREEMPTED, _PEER_LOST, -signal.SIGTERM]

    def blame(item: tuple[int, ProcessFailure]) -> tuple[int, int, int]:
        rank, failure = item
        code = failure.exitcode
        return consequences.index(code) if code in consequences else -1, failure.timestamp, rank

    return min(result.failures.items(), key=blame)


def how_it_ended(failure: ProcessFailure, said: str) -> str:
    """`killed by SIGKILL`, or `exit code 1: what it said`."""
    if failure.exitcode < 0:
        return f"killed by {failure.signal_name()}"
    return f"exit code {failure.exitcode}" + (f": {said}" if said else "")


class _Agent(LocalElasticAgent):
    """Torch's agent, except for when it restarts and how long it waits for workers to stop.

    It does not restart what no restart mends: a wrong command, configuration or data, a stop that
    was asked for, or the same error as last time.
    """

    _logs_specs: _Logs
    _said = ""
    max_nodes = 1
    goes_on_from = ""

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown(timeout=self._shutdown_timeout)

    def _somebody_waits(self, worker_group: WorkerGroup) -> bool:
        """Whether a node waits to join (none can where all have come)."""
        if (worker_group.group_world_size or 1) >= self.max_nodes:
            return False
        time.sleep(_RENDEZVOUS_CACHE_S)
        return self._rdzv_handler.num_nodes_waiting() > 0

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        assert isinstance(self._pcontext, SubprocessContext)
        handlers = self._pcontext.subprocess_handlers.values()
        if any(handler.proc.poll() for handler in handlers):
            # One has failed: end the others. (Torch's own call waits 30 s, whatever was asked.)
            self._pcontext.close(signal.SIGTERM, self._shutdown_timeout)
        result = super()._monitor_workers(worker_group)
        if not result.is_failed():
            return result
        rank, failure = first_failure(result)
        if failure.exitcode == _PREEMPTED and self._somebody_waits(worker_group):
            # Stopped by a node that makes room for a new one: torch then restarts, uncounted.
            return RunResult(state=WorkerState.HEALTHY)
        if failure.exitcode in _FINAL | {_PREEMPTED, -signal.SIGTERM}:
            self._remaining_restarts = 0  # no restart mends these
        elif self._remaining_restarts:
            said = self._logs_specs.message(failure.local_rank)
            if said and said == self._said and failure.exitcode not in _KNOWN:
                self._remaining_restarts = 0
                return result
            self._said = said
            how = how_it_ended(failure, said)
            print(
                f"lightship: rank {rank} ended ({how}); all start again from {self.goes_on_from}, "
                f"{self._remaining_restarts} restarts left",
                file=sys.stderr,
                flush=True,
            )
        return result
