"""A call in a child process of bounded memory and time, to read hostile files in (Linux)."""

import re
import resource
import signal
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lightship.errors import LightshipError
from tests.support.fork_server import FORK_SERVER

_MAX_SPACE_BYTES = 8 * 2**30
"""Address space beyond what the imports take: stops an attack before it harms the machine."""


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Attributes:
        result: What it returned.
        error: Text of the LightshipError that it raised.
        exit_code: Of that error; None without one.
        peak_mib: Growth of the resident memory at its peak.
    """

    result: Any
    error: str | None
    exit_code: int | None
    peak_mib: float


def call_bounded(
    call: Callable[..., Any], *args: Any, max_mib: float = 1024, max_s: float = 120
) -> Outcome:
    """`call(*args)`, both picklable, in a child.

    Raises:
        AssertionError: It ended by a signal, by another exception, took more memory, or did not
            end within the bound.
    """
    return call_each(call, {call.__name__: args}, max_mib, max_s)[call.__name__]


def call_each(
    call: Callable[..., Any],
    args_of: Mapping[str, tuple[Any, ...]],
    max_mib: float = 1024,
    max_s: float = 120,
) -> dict[str, Outcome]:
    """As `call_bounded`, one call after another in one child; an error says in which of them."""
    ours, theirs = FORK_SERVER.Pipe(duplex=False)
    child = FORK_SERVER.Process(
        target=_run, args=(theirs, call, list(args_of.values())), daemon=True
    )
    child.start()
    theirs.close()
    outcomes = {}
    try:
        for name in args_of:
            assert ours.poll(max_s), f"{name}: still running after {max_s} s"
            result, error, exit_code, crash, peak_mib = ours.recv()
            assert crash is None, f"{name}: {crash}"
            assert peak_mib <= max_mib, f"{name}: {peak_mib:.0f} MiB, not {max_mib} ({error})"
            outcomes[name] = Outcome(result, error, exit_code, peak_mib)
    except EOFError:
        child.join(10)
        code = child.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"code {code}"
        raise AssertionError(f"{name}: the child died: {how}") from None
    finally:
        child.kill()
        child.join()
    return outcomes


def refusals(
    call: Callable[..., Any],
    args_of: Mapping[str, tuple[Any, ...]],
    max_mib: float = 1024,
    max_s: float = 120,
) -> dict[str, str]:
    """The texts of the DataErrors that `call_each` must end in."""
    said = {}
    for name, outcome in call_each(call, args_of, max_mib, max_s).items():
        assert outcome.exit_code == 65, (name, outcome)
        assert outcome.error is not None
        assert len(outcome.error) < 1000, (name, outcome)
        said[name] = outcome.error
    return said


def _run(answer: Connection, call: Callable[..., Any], args_of: list[tuple[Any, ...]]) -> None:
    size = _status_kib("VmSize") * 1024 + _MAX_SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for args in args_of:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status_kib("VmHWM")
        result = error = exit_code = crash = None
        try:
            result = call(*args)
        except LightshipError as found:
            error, exit_code = str(found), found.exit_code
        except BaseException:
            crash = traceback.format_exc()
        peak_mib = (_status_kib("VmHWM") - before) / 1024
        answer.send((result, error, exit_code, crash, peak_mib))


def _status_kib(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])
