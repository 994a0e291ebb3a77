"""The workers' output and last words, and which of them is to blame for a failure."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server import RunResult
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest, Std
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from lightship.errors import EXIT_CODES, LightshipError

_CODES = {row.code for row in EXIT_CODES.values() if row.code}
FINAL = {EXIT_CODES[name].code for name in ("usage", "data", "diverged", "config")}
PREEMPTED, PEER_LOST = EXIT_CODES["preempted"].code, EXIT_CODES["peer_lost"].code
_TAIL_LINES = 20


def is_known(code: int) -> bool:
    """Whether an exit code is one of lightship's; anything else is a crash."""
    return code in _CODES


class WorkerFailed(LightshipError):
    """A worker failed and no restart is left or would help; the agent exits with its code."""

    def __init__(self, text: str, code: int, output: Sequence[str] = ()) -> None:
        super().__init__(text)
        self._code, self.lines_below = code, output

    @property
    def exit_code(self) -> int:
        """The worker's code if it is one of lightship's, else 1."""
        return self._code if is_known(self._code) else 1


class WorkerLogs(DefaultLogsSpecs):
    """Output of local rank 0 goes to the console, that of the others to files.

    Attributes:
        is_needed: Whether a message names a file, so that the folder must stay.
    """

    def __init__(self, path: Path, processes: int) -> None:
        super().__init__(str(path), dict.fromkeys(range(1, processes), Std.ALL))
        self.is_needed = False
        self._last: LogsDest | None = None

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Torch's choice of files, kept for `message` and `failure`."""
        self._last = super().reify(envs)
        return self._last

    def message(self, local_rank: int) -> str:
        """The error message that a worker of the last attempt has written, or ''."""
        return str(self._error(local_rank).get("message", ""))

    def is_taken_over(self, result: RunResult) -> bool:
        """Whether a worker ended because a later start of the run has taken over."""
        ranks = [failure.local_rank for failure in result.failures.values()]
        return any(self._error(rank).get("is_taken_over") for rank in ranks)

    def _error(self, local_rank: int) -> dict[str, Any]:
        """What `comm.write_error_file` has written in a worker of the last attempt, or nothing."""
        if self._last is None:
            return {}
        path = Path(self._last.error_files[local_rank])
        return ProcessFailure(local_rank, 0, 0, str(path)).error_file_data if path.is_file() else {}

    def failure(self, result: RunResult) -> WorkerFailed:
        """The first failure, with its last lines if they are not on the console."""
        rank, failure = first_failure(result)
        code, said = failure.exitcode, self.message(failure.local_rank)
        if code == -signal.SIGTERM:  # before its handler was installed
            code, said = PREEMPTED, "stopped by SIGTERM before training began"
        if is_known(code):
            where = "" if code in FINAL | {PREEMPTED} else f"rank {rank}: "
            return WorkerFailed(f"{where}{said or f'a worker exited with code {code}'}", code)
        below: list[str] = []
        assert self._last is not None
        output = self._last.stderrs[failure.local_rank]
        if output:
            self.is_needed = True
            lines = Path(output).read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            below = [*(f"[rank {rank}] {line}" for line in lines), f"full output: {output}"]
        return WorkerFailed(f"rank {rank} {how_it_ended(failure, said)}", code, below)


def first_failure(result: RunResult) -> tuple[int, ProcessFailure]:
    """(rank, failure) of the worker to blame: not one that ended because another did, if possible.

    Torch's timestamps do not tell: they are whole seconds, within which all workers end.
    """
    consequences = [-signal.SIGKILL, PREEMPTED, PEER_LOST, -signal.SIGTERM]

    def blame(item: tuple[int, ProcessFailure]) -> tuple[int, int, int]:
        rank, failure = item
        code = failure.exitcode
        return consequences.index(code) if code in consequences else -1, failure.timestamp, rank

    return min(result.failures.items(), key=blame)


def how_it_ended(failure: ProcessFailure, said: str) -> str:
    """`was killed by SIGKILL`, or `exited with code 1: its message`."""
    if failure.exitcode < 0:
        return f"was killed by {failure.signal_name()}"
    return f"exited with code {failure.exitcode}" + (f": {said}" if said else "")
