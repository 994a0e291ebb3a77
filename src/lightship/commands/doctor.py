"""The doctor's entry: runs all checks, prints each, and ends as the first failure says."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

from lightship import storage
from lightship.commands.base import Command
from lightship.doctor import render
from lightship.doctor.check import Finding, run
from lightship.doctor.rows import Examination
from lightship.errors import ConfigError

_STORAGE_DEADLINE_S = 8.0
"""Bound of each call of the storage here, where a fit tries for two minutes."""


def examine(command: Command, is_worker: bool) -> None:
    """Check all that can be checked without training, and print it as a table. Blocks, under 30 s.

    Args:
        command: `lightship doctor` with the flags of a fit.
        is_worker: Whether a launcher started this process as one of several. Then the first of each
            node checks all, and the others take part in the exchange alone.

    Raises:
        ConfigError: A check failed; its text is the first failure's.
    """
    asked = Examination(command.config, command.wrong, is_worker, import_fit)
    checks = asked.checks()
    if is_worker and os.environ["LOCAL_RANK"] != "0":
        checks = [check for check in checks if check.name == "all-reduce"]
        opened: AbstractContextManager[render.Show] = nullcontext(lambda name, finding: None)
    else:
        names = [check.name for check in checks]
        opened = render.table(names, command.config.run.log_format)
    first: tuple[str, Finding] | None = None
    with _storage_deadline(), opened as show:
        for check, told in run(checks, asked.imported):
            finding = replace(told, found=storage.redact(told.found))
            show(check.name, finding)
            if finding.status == "fail" and first is None:
                first = check.name, finding
    if first is not None:
        name, finding = first
        fix = f"; fix: {finding.fix}" if finding.fix else ""
        raise ConfigError(" ".join(f"{name}: {finding.found}{fix}".split()))


def import_fit() -> None:
    """Import all that a fit imports, once, on one thread."""
    import logging
    from importlib import import_module

    for module in ("distributed.elastic_agent", "distributed.launcher", "commands.fit"):
        import_module(f"lightship.{module}")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@contextmanager
def _storage_deadline() -> Iterator[None]:
    """Storage that gives up sooner, unless the environment says something."""
    name = "LIGHTSHIP_STORAGE_DEADLINE_S"
    is_ours = name not in os.environ
    os.environ.setdefault(name, f"{_STORAGE_DEADLINE_S:g}")
    try:
        yield
    finally:
        if is_ours:
            del os.environ[name]
