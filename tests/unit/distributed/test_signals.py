"""What each signal does in each phase is what the table says; handlers are restored."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightship
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
import signal, sys, time
from lightship.distributed.signals import Phase, StopRequest
from lightship.errors import Preempted
signal.signal(signal.SIGHUP, signal.SIG_DFL)
try:
    with StopRequest(Phase[sys.argv[1]]) as stop:
        for name in sys.argv[2:]:
            signal.raise_signal(signal.Signals[name])
        print(f"flag {stop.number}", file=sys.stderr)
except Preempted as error:
    print(f"raised: {error}", file=sys.stderr)
"""


def child(phase: Phase, *names: str) -> tuple[int, str]:
    """Exit code and output of a process that sends itself signals in a phase."""
    command = [sys.executable, "-c", CHILD, phase.name, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("phase", HANDLED, ids=lambda phase: phase.name)
def test_a_process_does_what_the_table_says(phase: Phase, name: str) -> None:
    response, number = RESPONSES[phase], signal.Signals[name]
    line = response.text(number)
    assert name in line
    expected = {
        Action.EXIT: (response.exit_code, f"lightship: {line}\n"),
        Action.RAISE: (0, f"raised: {line}\n"),
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
