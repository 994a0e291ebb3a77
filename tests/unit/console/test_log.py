"""The one logger: what its handler shows of a record, where, and of which ranks."""

import io
import json
import logging
import sys

import pytest

from lightship import cli
from lightship.console import log
from lightship.console.screen import Screen

logger = logging.getLogger("lightship.some.module")


def lines(log_format: str = "text", level: str = "info", rank: int = 0) -> list[str]:
    """What is shown of one record a level."""
    stream = io.StringIO()
    with log.shown(Screen(log_format, stream), level):
        log.set_rank(rank)
        for name in ("debug", "info", "warning", "error"):
            getattr(logger, name)('a "quoted" text')
    logger.warning("after the command")
    return stream.getvalue().splitlines()


def test_info_is_a_timed_line_and_the_rest_is_marked():
    assert lines() == [
        '[   0:00] a "quoted" text',
        '[   0:00] warning: a "quoted" text',
        '[   0:00] error: a "quoted" text',
    ]


def test_json_lines_are_events_of_their_level():
    events = [json.loads(line) for line in lines("json", "debug")]
    assert [event["event"] for event in events] == ["debug", "note", "warning", "error"]
    assert {event["text"] for event in events} == {'a "quoted" text'}
    assert all(event["time"].endswith("+00:00") for event in events)


def test_the_level_is_the_least_that_is_shown():
    assert len(lines(level="debug")) == 4
    assert len(lines(level="warning")) == 2


def test_other_ranks_show_warnings_with_their_rank():
    assert lines(rank=3) == [
        '[   0:00] warning: rank 3: a "quoted" text',
        '[   0:00] error: rank 3: a "quoted" text',
    ]


def test_a_traceback_is_shown_where_it_is_logged():
    stream = io.StringIO()
    with log.shown(Screen("text", stream), "info"):
        try:
            raise OSError("out of luck")
        except OSError:
            logger.exception("cannot read")
    assert "error: cannot read\nTraceback" in stream.getvalue()
    assert stream.getvalue().endswith("OSError: out of luck\n")


def test_a_line_is_written_at_once_to_the_stream_of_its_time(capsys, monkeypatch):
    writes: list[str] = []
    with log.shown(Screen("text"), "info"):
        logger.info("captured")
        monkeypatch.setattr(sys.stderr, "write", writes.append)
        logger.info("whole")
    assert capsys.readouterr().err == "[   0:00] captured\n"
    assert "".join(writes) == "[   0:00] whole\n"
    assert writes[0] == "[   0:00] whole\n"


def test_outside_a_command_standard_logging_applies(caplog):
    with caplog.at_level(logging.INFO):
        assert log.screen() is None
        logger.info("for a handler of the program's own")
    assert caplog.messages == ["for a handler of the program's own"]


@pytest.mark.parametrize(("flags", "shown"), [([], True), (["--log_level", "warning"], False)])
def test_a_command_shows_its_messages_by_its_flag(tmp_path, capsys, flags, shown):
    assert cli.main(["pack", "digits", str(tmp_path / "packed"), *flags]) == 0
    told = capsys.readouterr().err
    assert ("packing" in told) == shown


def test_captured_warnings_are_not_shown():
    stream = io.StringIO()
    with log.shown(Screen("text", stream), "info"):
        with log.captured("lightship.some") as warnings:
            logger.info("starting")
            logger.warning("no answer")
        logger.info("after")
    assert warnings == ["no answer"]
    assert stream.getvalue() == "[   0:00] after\n"
