"""`lightship doctor`: checks a fit's settings and machine without training."""

import logging
import os
from contextlib import nullcontext, suppress
from functools import partial
from importlib import import_module

from lightship import storage
from lightship.commands.base import Command
from lightship.doctor import render
from lightship.doctor.checks import CHECKS
from lightship.doctor.context import Context
from lightship.doctor.runner import run
from lightship.errors import ConfigError


def doctor(command: Command, is_worker: bool) -> None:
    """Run all checks and print their findings. Blocks, less than 30 s.

    Args:
        command: `lightship doctor` with the flags of a fit.
        is_worker: Whether a launcher started this process as one of several. The first of each
            node then runs all checks, the others the all-reduce only.

    Raises:
        ConfigError: A check failed; the text is the first failure's.
    """
    checks, log_format = CHECKS, command.config.run.log_format
    is_first = not is_worker or os.environ["LOCAL_RANK"] == "0"
    if not is_first:
        checks = [check for check in CHECKS if check.name == "all-reduce"]
    failure = ""
    with storage.short_deadline():
        context = Context(command.config, command.wrong, is_worker, partial(load, command))
        names = [check.name for check in checks]
        with render.table(names, log_format) if is_first else nullcontext() as show:
            for check, finding in run(checks, context):
                if show:
                    show(check.name, finding)
                if finding.status == "fail" and not failure:
                    fix = f"; fix: {finding.fix}" if finding.fix else ""
                    failure = " ".join(f"{check.name}: {finding.found}{fix}".split())
    if failure:
        raise ConfigError(failure)


def load(command: Command) -> None:
    """Import what a fit imports, and complete the settings as it does, as far as the net tells."""
    import_fit()
    with suppress(ConfigError):  # the check of the net says why
        import_module("lightship.commands.choosing").choose(command, None)
        import_module("lightship.models.preprocessing").adopt_by_name(command.config)


def import_fit() -> None:
    """Import all that a fit imports."""
    for module in ("distributed.elastic_agent", "distributed.launcher", "commands.fit"):
        import_module(f"lightship.{module}")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
