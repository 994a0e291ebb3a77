"""The exit codes, and the errors that end in them: the contract with whoever started the process.

A Job controller reads nothing but the code, so each code means one reaction (see `EXIT_CODES`).
An error raised as one of the classes below is the user's or the world's: the entry prints its text
in a line or two. Any other exception is ours and keeps its traceback.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExitCode:
    """One row of the contract."""

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
    """Base of every error that is told in a line and ends in a code of the contract."""

    exit_name = "config"

    @property
    def exit_code(self) -> int:
        """The process exit code this error ends in."""
        return EXIT_CODES[self.exit_name].code


class UsageError(LightshipError, ValueError):
    """The command line cannot be understood: unknown flag, wrong type (exit 2)."""

    exit_name = "usage"


class DataError(LightshipError, ValueError):
    """The data cannot be trained on: nothing there, labels differ, undecodable (exit 65)."""

    exit_name = "data"


class ConfigError(LightshipError, ValueError):
    """What was asked for is impossible here: bad value, no access, not writable (exit 78)."""

    exit_name = "config"


class Diverged(LightshipError):
    """The loss is not finite, and the user wants the run to end then (exit 70)."""

    exit_name = "diverged"


class TimeoutExpired(LightshipError, TimeoutError):
    """A bounded wait ran out and nobody is to blame; trying again may help (exit 74)."""

    exit_name = "timeout"


class PeerLost(LightshipError):
    """Another process of the job is gone; this one is well (exit 75)."""

    exit_name = "peer_lost"


class Preempted(LightshipError):
    """Asked to stop, and the state is saved (exit 143)."""

    exit_name = "preempted"


def in_one_line(error: BaseException) -> str:
    """`error` with its kind, short enough for a line of the log."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
