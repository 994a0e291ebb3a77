"""Exit codes, and the exceptions that end in them.

A Kubernetes Job sees only the exit code, so each code means one reaction (see `EXIT_CODES`). The
exceptions below are errors of the user or the environment: their text is printed in a line or two.
Any other exception is a bug and is printed with its traceback.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lightship.redaction import excerpt


@dataclass(frozen=True)
class ExitCode:
    """One exit code, its meaning, and how a Job should react."""

    code: int
    meaning: str
    reaction: str


EXIT_CODES: dict[str, ExitCode] = {
    row[0]: ExitCode(*row[1:])
    for row in (
        ("ok", 0, "finished, final checkpoint durable", "success"),
        ("usage", 2, "usage: unknown flag, wrong type", "fail at once"),
        ("data", 65, "data: nothing to read, labels do not match, too many bad", "fail at once"),
        ("diverged", 70, "training diverged: the loss is not finite", "fail at once"),
        ("config", 78, "configuration: impossible, no credentials, not writable", "fail at once"),
        ("timeout", 74, "a bounded wait expired with no culprit", "retry, counted"),
        ("peer_lost", 75, "a peer was lost; this process is well", "retry, not counted"),
        ("preempted", 143, "asked to stop (SIGTERM), state saved", "retry, not counted"),
    )
}


class LightshipError(Exception):
    """Base of all errors that are printed in a line and have an exit code of `EXIT_CODES`."""

    exit_name = "config"
    log_format: str | None = None
    """Of the command's lines, if it is known and there is no `Command` yet."""
    lines_below: Sequence[str] = ()
    """What is printed below the text, a line each: the last output of a worker."""

    @property
    def exit_code(self) -> int:
        """The process's exit code."""
        return EXIT_CODES[self.exit_name].code


class UsageError(LightshipError, ValueError):
    """Invalid command line: unknown flag, wrong type (exit 2)."""

    exit_name = "usage"


class DataError(LightshipError, ValueError):
    """Unusable data: nothing to read, labels do not match, undecodable (exit 65)."""

    exit_name = "data"


class ConfigError(LightshipError, ValueError):
    """Impossible configuration: invalid value, access denied, not writable (exit 78)."""

    exit_name = "config"


class Diverged(LightshipError):
    """The loss is not finite, with --trainer.on_nonfinite stop (exit 70)."""

    exit_name = "diverged"


class TimeoutExpired(LightshipError, TimeoutError):
    """A timeout without a known cause; retrying may help (exit 74)."""

    exit_name = "timeout"


class PeerLost(LightshipError):
    """Another process of the job was lost; this one is healthy (exit 75)."""

    exit_name = "peer_lost"


class TakenOver(PeerLost):
    """A later start of the run has taken over: only it trains on (exit 75)."""


class Preempted(LightshipError):
    """Stopped by a signal, with the state saved (exit 143)."""

    exit_name = "preempted"


def in_one_line(error: BaseException) -> str:
    """`error` with its type, without secrets, in at most 300 characters."""
    return excerpt(f"{type(error).__name__}: {error}")
