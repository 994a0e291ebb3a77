"""Runs checks side by side, each with its deadline."""

import sys
import traceback
from collections.abc import Iterator, Sequence
from functools import partial

from lightship.doctor.checks import Check, Finding, skipped
from lightship.doctor.context import Context
from lightship.errors import LightshipError
from lightship.storage.parallel import in_daemon


def run(checks: Sequence[Check], context: Context) -> Iterator[tuple[Check, Finding]]:
    """Run all checks at once and yield their findings in order.

    Blocks until the last deadline at most: a check that hangs is left on a daemon thread.
    """
    running = [in_daemon(partial(_look, check, context)) for check in checks]
    for check, future in zip(checks, running, strict=True):
        late = f"no answer within {check.deadline_s:g} s"
        if context.is_known(future, check.deadline_s):
            yield check, future.result()
        elif check.needs_imports and not context.loaded.done():
            yield check, skipped("lightship is still being imported, see imports")
        elif check.if_late == "skipped":
            yield check, skipped(late)
        else:
            means = check.means if check.if_late == "fail" else f"if it fails: {check.means}"
            yield check, Finding(check.if_late, late, means, check.fix)


def _look(check: Check, context: Context) -> Finding:
    if context.invalid and check.name == "configuration":  # known without the imports
        return Finding("fail", context.invalid, check.means, check.fix)
    if context.invalid and check.needs_config:
        return skipped("the configuration is invalid")
    if check.needs_imports and (error := context.loaded.exception()) is not None:
        return skipped(f"lightship cannot be imported ({error!r})")
    try:
        return check.look(context)
    except LightshipError as error:
        return Finding("fail", str(error), check.means, check.fix)
    except Exception as error:
        # A check that breaks must not hide the others' findings.
        traceback.print_exc(file=sys.stderr)
        found = f"{type(error).__name__}: {error}"
        return Finding("fail", found, check.means, f"{check.fix}; the traceback is printed above")
