"""A log that cannot be written, a missing descriptor, a letter the encoding lacks: nothing ends."""

import json
import os
import subprocess
import sys

import pytest

_SET_UP = "import os, sys; from lightship.console import streams; streams.set_up(); "


def python(code: str, shell: str = "", **options):
    """Run `code` after the set-up, with the shell's redirections; its `said` goes to a file."""
    command = f'exec "$0" -c "$1" {shell}'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, _SET_UP + code],
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def closed_pipe() -> int:
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def hung_up_terminal() -> int:
    """A terminal whose other side is gone: each write is an EIO."""
    master, slave = os.openpty()
    os.close(master)
    return slave


@pytest.mark.parametrize("make", [closed_pipe, hung_up_terminal])
def test_a_log_that_nobody_can_read_ends_nothing(tmp_path, make):
    code = (
        _SET_UP + "print('out' * 9999); print('err', file=sys.stderr, flush=True); "
        "sys.stdout.flush(); streams.write_error('gone'); print(sys.stdout.isatty()); "
        f"open({str(tmp_path / 'done')!r}, 'w').write('done')"
    )
    descriptor = make()
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=descriptor, stderr=descriptor, timeout=60
    )
    os.close(descriptor)
    assert done.returncode == 0
    assert (tmp_path / "done").read_text() == "done"


def test_a_full_disk_under_the_log_ends_nothing_but_is_an_error_of_output():
    done = python(
        "print('out'); print('err', file=sys.stderr)\n"
        "try: streams.check_output()\n"
        "except ValueError as error: os.write(3, str(error).encode())",
        "3>&1 >/dev/full 2>&1",
    )
    assert done.returncode == 0
    assert done.stdout == "standard output cannot be written: No space left on device"


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    done = python("print('x\\n' * 99999); streams.check_output()", "| head -1", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "x\n", "")


def test_missing_descriptors_are_those_of_dev_null_for_children_too():
    paths = "[os.readlink(f'/proc/self/fd/{n}') for n in (0, 1, 2)]"
    show = f"import os; os.write(9, str({paths}).encode())"
    code = (
        f"print('nowhere', file=sys.stderr); {show}; import subprocess; "
        f"subprocess.run([sys.executable, '-c', {show!r}], pass_fds=[9])"
    )
    done = python(code, "9>&1 <&- >&- 2>&-")
    assert done.returncode == 0
    assert done.stdout == str(["/dev/null"] * 3) * 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "ascii:strict"])
def test_what_the_encoding_has_no_letters_for_is_escaped(encoding):
    code = "print('\\u6f22 \\udcff'); print('\\udcff', file=sys.stderr)"
    done = python(code, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 0
    assert done.stdout in ("\\u6f22 \\udcff\n", "\u6f22 \\udcff\n")
    assert done.stderr == "\\udcff\n"


def test_a_stream_that_was_made_non_blocking_loses_nothing_to_a_slow_reader():
    code = "os.set_blocking(1, False); print('x' * 10**6); sys.stdout.flush()"
    done = python(code, "| (sleep 0.2; wc -c)")
    assert done.stdout.strip() == str(10**6 + 1)


def test_a_warning_is_one_line_without_its_source():
    warn = "warnings.warn_explicit('not\\nread', UserWarning,"
    own = f"import warnings; {warn} streams.__file__, 1); {warn} 'else.py', 1)"
    text = python(f"streams.show_foreign_text(False); {own}").stderr.splitlines()
    assert text == ["lightship: not read", "else.py:1: UserWarning: not", "read"]
    lines = python(f"streams.show_foreign_text(True); {own}").stderr.splitlines()
    assert [(e["event"], e["text"]) for e in map(json.loads, lines)] == [
        ("warning", "not read")
    ] * 2


_FAIL = (
    "import threading; streams.show_foreign_text({as_json}); print('out https://u:hunter22@h/x'); "
    "print('bar 1\\rbar 2\\x1b[K'); print('no end', end=''); "
    "os.environ['MY_TOKEN'] = 'hunter22-of-the-environment'; "
    "t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join(); "
    "raise ValueError('hunter22-of-the-environment\\n[   0:00] forged\\x1b[2J')"
)


def test_uncaught_exceptions_and_prints_are_events_where_lines_are_json():
    done = python(_FAIL.format(as_json=True))
    assert done.returncode == 1
    assert "hunter22" not in done.stdout + done.stderr
    assert [(e["event"], e["text"]) for e in map(json.loads, done.stdout.splitlines())] == [
        ("output", "out https://***@h/x"), ("output", "bar 2\\x1b[K"), ("output", "no end"),
    ]  # fmt: skip
    of_thread, of_main = map(json.loads, done.stderr.splitlines())
    assert of_thread["text"] == "ZeroDivisionError: division by zero"
    assert of_main["event"] == "error"
    assert of_main["text"] == "ValueError: ***\\n[   0:00] forged\\x1b[2J"
    assert of_main["traceback"][0].startswith("Traceback")
    assert of_main["traceback"][-1] == "    [   0:00] forged\\x1b[2J"


def test_a_traceback_is_pythons_without_secrets_and_forged_lines():
    done = python(_FAIL.format(as_json=False))
    assert done.returncode == 1
    assert "hunter22" not in done.stdout + done.stderr
    assert done.stdout.startswith("out https://***@h/x\n")
    *_, before, last = done.stderr.splitlines()
    assert before == "ValueError: ***"
    assert last == "    [   0:00] forged\\x1b[2J"
    assert "ZeroDivisionError: division by zero\n" in done.stderr
