"""The entry point: parses the command line and runs the command. Imports no torch."""

import atexit
import logging
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lightship.cli import host_environment
from lightship.cli.command_line import parse
from lightship.commands.base import Command, PackCommand
from lightship.console import log, streams
from lightship.console.screen import Screen
from lightship.distributed import libraries
from lightship.distributed.arguments import restore
from lightship.distributed.signals import Phase, StopRequest
from lightship.errors import LightshipError
from lightship.redaction import learn, redact
from lightship.safe_text import shown

__all__ = ["main", "parse"]

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the process's exit code (see errors.py).

    Args:
        argv: The command line; None: this process's own, which then ends with that code.
    """
    arguments = restore(sys.argv[1:]) if argv is None else list(argv)
    learn(*arguments)
    finished: list[int] = []
    if argv is None:
        atexit.register(_end_at_once, finished)  # before all others: called after them
        streams.set_up()
        streams.show_foreign_text(_asks_for_json(arguments))
        sys.argv[1:] = map(redact, arguments)  # libraries record it: W&B, torch
        host_environment.complete()
        # Also what a child of a child starts must not import from the working directory.
        os.environ["PYTHONSAFEPATH"] = "1"
        # OpenMP's idle threads sleep soon (read when torch loads): where processes share cores, a
        # spinning thread delays the one that it waits for; see docs/measurements.md.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        libraries.begin_imports()
        libraries.preload()
        # Imports take seconds, and a container's process 1 ignores signals without a handler.
        StopRequest(Phase.COMMAND).install()
    command = None
    try:
        command = parse(arguments)
        if command is not None:
            if argv is None:
                streams.show_foreign_text(command.log_format == "json")
                of_run = command.config.run.output if isinstance(command, Command) else None
                host_environment.provide_folders(of_run)
            with log.shown(Screen(command.log_format), command.log_level):
                _announce(command)
                from lightship.commands.dispatch import run  # heavy: not for a wrong command line

                run(command, arguments)
        if command is None or (isinstance(command, Command) and command.prints):
            streams.check_output()
        code = 0
    except LightshipError as error:
        log_format = error.log_format if command is None else command.log_format
        _tell(error, log_format == "json" if log_format else _asks_for_json(arguments))
        code = error.exit_code
    finished.append(code)
    return code


def _announce(command: Command | PackCommand) -> None:
    """The first line of a fit, before the imports, which take seconds. Once, not by every rank."""
    rank = os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0"))
    is_of_agent = "TORCHELASTIC_RUN_ID" in os.environ
    if isinstance(command, Command) and command.name == "fit" and rank == "0" and not is_of_agent:
        root, output = command.config.data.root, str(command.config.run.output)
        logger.info(
            f"loading PyTorch and Lightning; images from {redact(root)}, outputs to "
            f"{redact(output)}"
        )


def _end_at_once(finished: Sequence[int]) -> None:
    """End the process, the last call at its exit: what Python would do next is of no use.

    It frees the modules of torch and Lightning one by one, which takes a second, and unwinds the
    threads of abandoned calls to storage, or checks: within native code that aborts the process.

    Args:
        finished: The exit code; empty where an exception is on its way, for which Python has one.
    """
    for code in finished:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _asks_for_json(arguments: Sequence[str]) -> bool:
    """Whether flags ask for JSON lines, before they are parsed: for an error of the parser."""
    words = [word for item in arguments for word in item.split("=", 1)]
    flags = ("--run.log_format", "--log_format")
    return any(flag in flags and value == "json" for flag, value in pairwise(words))


def _tell(error: LightshipError, is_json: bool) -> None:
    """One line on standard error, and those of a worker below it; one event if lines are JSON."""
    if is_json:
        facts: dict[str, Any] = {"exit_code": error.exit_code, "text": str(error)}
        facts |= {"output": list(error.lines_below)} if error.lines_below else {}
        streams.write_line(sys.stderr, streams.event("error", facts))
        return
    for line in (f"lightship: {error}", *error.lines_below):
        streams.write_line(sys.stderr, shown(line))
