"""What each signal does in each phase is what the table says; handlers are restored."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightship
from lightship.distributed import liveness
from lightship.distributed.signals import (
    RESPONSES,
    SECOND_SIGINT,
    Action,
    Phase,
    StopRequest,
    stop_signals,
)

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
HANDLED = [phase for phase in RESPONSES if phase is not Phase.AGENT]
CHILD = """
import os, signal, sys, time
from lightship.distributed import liveness
from lightship.distributed.signals import Phase, StopRequest
from lightship.errors import LightshipError
liveness._began_s -= float(os.environ.get("TEST_AGE_S", "0"))
signal.signal(signal.SIGHUP, signal.SIG_DFL)
try:
    with StopRequest(Phase[sys.argv[1]]) as stop:
        for name in sys.argv[2:]:
            signal.raise_signal(signal.Signals[name])
        print(f"flag {stop.number}", file=sys.stderr)
except LightshipError as error:
    print(f"raised {error.exit_code}: {error}", file=sys.stderr)
"""


def child(phase: Phase, *names: str, **env: str) -> tuple[int, str]:
    """Exit code and output of a process that sends itself signals in a phase."""
    command = [sys.executable, "-c", CHILD, phase.name, *names]
    env = {**os.environ, **env}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("phase", HANDLED, ids=lambda phase: phase.name)
def test_a_process_does_what_the_table_says(phase: Phase, name: str) -> None:
    response, number = RESPONSES[phase], signal.Signals[name]
    line = response.text(number)
    assert name in line
    expected = {
        Action.EXIT: (response.exit_code, f"lightship: {line}\n"),
        Action.RAISE: (0, f"raised 143: {line}\n"),
        Action.DEFER: (0, f"flag {number.value}\n"),
    }
    assert child(phase, name) == expected[response.action]


def test_where_lines_are_json_the_last_one_is_too() -> None:
    code = f"import json\nfrom lightship.console import streams\nstreams.set_up()\n" \
           f"streams.show_foreign_text(as_json=True)\n{CHILD}"  # fmt: skip
    command = [sys.executable, "-c", code, Phase.SETUP.name, "SIGTERM"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    response = RESPONSES[Phase.SETUP]
    assert (response.action, done.returncode) == (Action.EXIT, response.exit_code)
    [line] = done.stderr.splitlines()
    event = json.loads(line)
    assert (event["event"], event["exit_code"]) == ("error", response.exit_code)
    assert event["text"] == response.text(signal.SIGTERM)


@pytest.mark.parametrize("first", SIGNALS)
def test_sigint_after_a_stop_request_exits_without_saving(first: str) -> None:
    line = f"lightship: {SECOND_SIGINT.text(signal.SIGINT)}\n"
    assert child(Phase.TRAINING, first, "SIGINT") == (SECOND_SIGINT.exit_code, line)
    assert SECOND_SIGINT.exit_code == 130


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(
    ("silent_s", "age_s", "reason"),
    [
        (liveness.MAX_SILENCE_S + 10, 0, "no step for half an hour: stopped by the liveness probe"),
        (liveness.MAX_SILENCE_S - 60, 0, ""),
        (None, liveness.MAX_START_S, "no first step within an hour: stopped by the startup probe"),
        (None, liveness.MAX_START_S - 120, ""),
    ],
    ids=["silent", "evicted", "late", "evicted before the first step"],
)
@pytest.mark.parametrize("phase", [Phase.SETUP, Phase.LAUNCH], ids=["SETUP", "LAUNCH"])
def test_a_probe_that_ends_the_process_is_a_timeout(
    tmp_path: Path, phase: Phase, silent_s: float | None, age_s: float, reason: str, name: str
) -> None:
    """Which a Job counts: a set that needs more than an hour would be started again for ever."""
    beat = tmp_path / "beat"
    if silent_s is not None:
        beat.touch()
        os.utime(beat, (time.time() - silent_s,) * 2)
    env = {liveness.VARIABLE: str(beat), "TEST_AGE_S": str(age_s)}
    code, line = 143, RESPONSES[phase].text(signal.Signals[name])
    if reason and name == "SIGTERM":
        code, line = 74, reason
    expected = {
        Phase.SETUP: (code, f"lightship: {line}\n"),
        Phase.LAUNCH: (0, f"raised {code}: {line}\n"),
    }
    assert child(phase, name, **env) == expected[phase]


def test_signals_other_than_sigint_may_come_twice() -> None:
    assert child(Phase.TRAINING, "SIGINT", "SIGTERM", "SIGHUP") == (0, f"flag {signal.SIGINT}\n")


def test_every_phase_is_in_the_table_and_in_the_code() -> None:
    assert RESPONSES.keys() == set(Phase)
    root = Path(lightship.__file__).parent
    others = [path for path in root.rglob("*.py") if path.name != "signals.py"]
    code = "".join(path.read_text() for path in others)
    inside = {Phase.REPORT}  # the phase that a StopRequest enters by itself
    assert {phase for phase in Phase if f"Phase.{phase.name}" in code} == set(Phase) - inside
    assert "signal.signal(" not in code, "handlers have one owner"


def test_all_but_a_second_sigint_ends_with_143() -> None:
    assert {response.exit_code for response in RESPONSES.values()} == {143}


@pytest.fixture
def hangup_as_in_a_terminal() -> Iterator[None]:
    """SIGHUP is not ignored, even if the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("start", "expected"), [("", True), ("trap '' HUP; ", False)])
def test_sighup_asks_to_stop_unless_nohup_ignores_it(hangup_as_in_a_terminal, start, expected):
    code = "import signal; from lightship.distributed.signals import stop_signals as s; "
    code += "print(signal.SIGHUP in s(), signal.SIGTERM in s())"
    done = subprocess.run(
        ["bash", "-c", f'{start}exec "$0" -c "$1"', sys.executable, code],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == f"{expected} True\n"


def test_handlers_are_restored(hangup_as_in_a_terminal) -> None:
    before = [signal.getsignal(number) for number in stop_signals()]
    with StopRequest() as stop:
        stop.begin_training()
        signal.raise_signal(signal.SIGHUP)
        assert stop.number == signal.SIGHUP
    assert [signal.getsignal(number) for number in stop_signals()] == before
