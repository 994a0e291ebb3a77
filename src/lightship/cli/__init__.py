"""The entry point: parses the command line and runs the command. Imports no torch."""

import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from lightship.cli import host_environment
from lightship.cli.command_line import parse
from lightship.commands.base import Command
from lightship.console import log, streams
from lightship.console.screen import Screen
from lightship.distributed.signals import Phase, StopRequest
from lightship.errors import LightshipError

__all__ = ["main", "parse"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the process's exit code (see errors.py)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        streams.set_up()
        host_environment.complete()
        # OpenMP's idle threads sleep soon (read when torch loads): where processes share cores, a
        # spinning thread delays the one that it waits for; see docs/measurements.md.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        # Imports take seconds, and a container's process 1 ignores signals without a handler.
        StopRequest(Phase.COMMAND).install()
    command = None
    try:
        command = parse(arguments)
        if command is not None:
            if argv is None:
                streams.show_warnings(command.log_format == "json")
                of_run = command.config.run.output if isinstance(command, Command) else None
                host_environment.provide_folders(of_run)
            from lightship.commands.dispatch import run  # heavy: not for a wrong command line

            with log.shown(Screen(command.log_format), command.log_level):
                run(command, arguments)
        if command is None or (isinstance(command, Command) and command.name == "doctor"):
            streams.check_output()
        code = 0
    except LightshipError as error:
        _tell(error, "text" if command is None else command.log_format)
        code = error.exit_code
    if argv is None and command is not None:
        _leave_calls_behind(code)
    return code


def _leave_calls_behind(code: int) -> None:
    """Exit at once if abandoned calls to storage, or checks, still run.

    At a regular exit Python unwinds their threads; within native code that aborts the process.
    """
    from lightship.storage.parallel import calls_in_flight  # heavy, as above

    if calls_in_flight():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell(error: LightshipError, log_format: str) -> None:
    """One line on standard error, JSON if the other lines are."""
    line = f"lightship: {error}"
    if log_format == "json":
        facts = {"event": "error", "exit_code": error.exit_code, "text": str(error)}
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **facts})
    print(line, file=sys.stderr, flush=True)
