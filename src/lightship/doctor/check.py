"""A check: a question with a deadline, and its answer; checks run side by side."""

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from threading import Lock, Thread
from typing import Generic, Literal, TypeVar

from lightship.errors import LightshipError

T = TypeVar("T")
Status = Literal["ok", "warn", "fail", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The answer to a check.

    Attributes:
        status: `warn`: a fit would start, but not do what is probably meant; `fail`: it would end
            or waste its time; `skipped`: not looked at, and `found` says why.
        found: What is there.
        means: What that does to a fit.
        fix: What to change; empty where nothing needs to.
    """

    status: Status
    found: str
    means: str = ""
    fix: str = ""


def skipped(why: str) -> Finding:
    """A finding of nothing, and why."""
    return Finding("skipped", why)


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        name: What is checked.
        look: Finds out. A LightshipError from it is a failure whose text is what was found.
        means: What a failure does to a fit, for failures that `look` does not explain itself.
        fix: What then to change.
        deadline_s: Bound of the answer, from the start of all checks.
        if_late: Status where there is no answer by then.
        needs_imports: Whether `look` uses torch or what imports it.
    """

    name: str
    look: Callable[[], Finding]
    means: str
    fix: str
    deadline_s: float = 15.0
    if_late: Status = "fail"
    needs_imports: bool = True


def run(checks: Sequence[Check], imports: Callable[[], None]) -> Iterator[tuple[Check, Finding]]:
    """Run all checks at once and give their findings in the order of `checks`.

    Blocks until the last deadline at most: what hangs is left behind on a thread that does not keep
    the process alive.

    Args:
        checks: What to do.
        imports: What those that say so wait for. Large packages that import each other on several
            threads may find one another half done, so it is done once.
    """
    begun_s = time.monotonic()
    imported = in_daemon(imports)
    looking = [
        in_daemon(partial(_look, check, imported if check.needs_imports else None))
        for check in checks
    ]
    for check, future in zip(checks, looking, strict=True):
        left_s = begun_s + check.deadline_s - time.monotonic()
        if wait([future], max(0.0, left_s)).done:
            yield check, future.result()
        else:
            found = f"no answer within {check.deadline_s:g} s"
            late = Finding(check.if_late, found, check.means, check.fix)
            yield check, skipped(found) if check.if_late == "skipped" else late


def _look(check: Check, imported: "Future[None] | None") -> Finding:
    try:
        if imported is not None:
            imported.result()
    except Exception as error:
        return skipped(f"lightship cannot be imported ({error!r})")
    try:
        return check.look()
    except LightshipError as error:
        return Finding("fail", str(error), check.means, check.fix)
    except Exception as error:
        # One check that breaks must not take the others' findings with it; nothing is hidden.
        traceback.print_exc(file=sys.stderr)
        found = f"{type(error).__name__}: {error}"
        return Finding("fail", found, check.means, f"{check.fix}; the trace is printed above")


def in_daemon(work: Callable[[], T]) -> "Future[T]":
    """Run `work` on a thread that cannot keep the process alive, however long it hangs."""
    future: Future[T] = Future()

    def body() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=body, name="lightship-doctor", daemon=True).start()
    return future


class Once(Generic[T]):
    """What several checks need: made for the first that asks, the same for all others."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work, self._lock, self._made = work, Lock(), False
        self._value: T | None = None
        self._error: BaseException | None = None

    def __call__(self) -> T:
        """The value; raises what making it raised. Blocks while it is made."""
        with self._lock:
            if not self._made:
                try:
                    self._value = self._work()
                except BaseException as error:
                    self._error = error
                self._made = True
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]
