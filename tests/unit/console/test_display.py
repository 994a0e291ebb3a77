"""Which display is chosen, how a run's end looks, and progress without a trainer."""

import io
import itertools
import json
import logging

import pytest

from lightship.console import display, log, screen, work
from lightship.console.display import Bar, JsonLines, TextLines, build_display
from lightship.console.log_format import duration_text
from lightship.console.screen import Screen
from lightship.console.work import work_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_is_for_terminals(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    assert type(build_display("auto", Terminal())) is Bar
    assert type(build_display("auto", io.StringIO())) is TextLines
    assert type(build_display("text", Terminal())) is TextLines
    assert type(build_display("json", Terminal())) is JsonLines


def test_how_a_run_ended_is_a_sentence_or_its_numbers():
    for log_format, expected in (("text", "done: 0.5"), ("json", '"event": "done"')):
        stream = io.StringIO()
        with log.shown(Screen(log_format, stream), "info"):
            build_display(log_format).done("done: 0.5", {"test/acc": 0.5})
        assert expected in stream.getvalue()
    assert json.loads(stream.getvalue())["test/acc"] == 0.5


def test_durations():
    assert duration_text(59.9) == "0:59"
    assert duration_text(3661) == "1:01:01"
    assert duration_text(float("inf")) == "-"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_work_without_a_trainer_is_few_lines_and_the_last_is_whole(
    monkeypatch, log_format: str
) -> None:
    now_s = itertools.count(0.0, 0.5)
    for module in (display, screen, work):
        monkeypatch.setattr(module, "monotonic", lambda: next(now_s))
    stream = io.StringIO()
    with work_progress(build_display(log_format, stream), "images") as show:
        for done in range(0, 1001, 10):
            show(done, 1000)
        show(1000, 1000)
    lines = stream.getvalue().splitlines()
    assert 5 < len(lines) < 40, "of 101 calls"
    if log_format == "json":
        last = json.loads(lines[-1])
        assert (last["event"], last["done"], last["total"], last["unit"]) == (
            "work", 1000, 1000, "images",
        )  # fmt: skip
        assert last["per_s"] > 0
    else:
        assert "1,000/1,000 images" in lines[-1]
        assert "left 0:00" in lines[-1]
    assert len({line.split("]")[-1] for line in lines}) == len(lines), "no line twice"


def test_work_without_a_trainer_is_one_bar_in_a_terminal():
    stream = Terminal()
    with (
        log.shown(Screen("auto", stream), "info"),
        work_progress(build_display("auto"), "images") as show,
    ):
        show(0, 36)
        logging.getLogger("lightship.any").info("a line above")
        show(36, 36)
    text = stream.getvalue()
    assert "36/36 images" in text
    assert "a line above" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor comes back"
