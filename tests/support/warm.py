"""The command `lightship` without the seconds of its imports.

    subprocess.run([warm.executable(), "fit", ...])

The executable is a client of a few lines: it hands its arguments, environment, working directory
and standard streams to a process where the imports are done and nothing is used, which forks. The
fork is `lightship` from its entry point on. The client ends with the fork's exit code; if it is
killed, so is the fork. What a fresh interpreter imports, and from where, is not tested by this:
tests/e2e/test_untrusted_folder.py starts each command as a user does.
"""

import atexit
import json
import os
import select
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NoReturn

from tests.support.fork_server import FORK_SERVER
from tests.support.s3 import die_with_parent

NOTES = "LIGHTSHIP_TEST_NOTES"
"""Variable with a folder: the fork's `pid` is written there, and at its end its `peak_kib`."""
_CLIENT = f"""#!{sys.executable} -IS
import json, os, socket, struct, sys
request = json.dumps([sys.argv, dict(os.environ), os.getcwd()]).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[0] + ".socket")
    socket.send_fds(server, [struct.pack("<q", len(request))], [0, 1, 2])
    server.sendall(request)
    answer = server.recv(8)
code, = struct.unpack("<q", answer)  # no answer: the server has been lost
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@cache
def executable() -> str:
    """Path of the command; the first call starts the server, which ends with this process."""
    folder = tempfile.TemporaryDirectory(prefix="lightship-warm-")
    atexit.register(folder.cleanup)
    path = Path(folder.name, "lightship")
    path.write_text(_CLIENT)
    path.chmod(0o700)
    FORK_SERVER.Process(target=_serve, args=(f"{path}.socket",), daemon=True).start()
    end_s = time.monotonic() + 120
    while not Path(f"{path}.socket").exists():
        assert time.monotonic() < end_s, "the server has not come"
        time.sleep(0.02)
    return str(path)


def become(main: Callable[[], int], env: Mapping[str, str], files: Mapping[int, int]) -> NoReturn:
    """Be a process that runs `main` in this environment, and end as the interpreter would.

    Args:
        main: Returns the exit code.
        env: All of the environment.
        files: File descriptors by the numbers that they are to have.
    """
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # as exec would
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, file in files.items():
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(env)
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(path: str) -> None:
    die_with_parent()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.new")
        listener.listen(64)
        os.rename(f"{path}.new", path)
        supervisors: set[int] = set()
        while True:
            connection, _ = listener.accept()
            supervisors -= {pid for pid in supervisors if os.waitpid(pid, os.WNOHANG)[0]}
            if (pid := os.fork()) == 0:
                listener.close()
                _supervise(connection)
            supervisors.add(pid)
            connection.close()


def _supervise(connection: socket.socket) -> NoReturn:
    """Fork the command, wait for its end or the client's, and answer."""
    die_with_parent()
    head, files, *_ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as stream:
        argv, env, cwd = json.loads(stream.read(*struct.unpack("<q", head)))
    if (pid := os.fork()) == 0:
        connection.close()
        os.chdir(cwd)
        become(lambda: _main(argv, env), env, dict(enumerate(files)))
    for file in files:
        os.close(file)
    notes = Path(env[NOTES]) if NOTES in env else None
    if notes:
        (notes / "pid.new").write_text(str(pid))
        (notes / "pid.new").rename(notes / "pid")
    command = os.pidfd_open(pid)
    ready, _, _ = select.select([connection, command], [], [])
    if command not in ready:  # the client is gone
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    if notes:
        (notes / "peak_kib").write_text(str(usage.ru_maxrss))
    if command in ready:
        connection.sendall(struct.pack("<q", os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _main(argv: list[str], env: Mapping[str, str]) -> int:
    import torch

    from lightship import cli

    die_with_parent()
    sys.argv = argv
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(":") if path]
    if threads := env.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    if "LIGHTSHIP_TEST_FORK_RANKS" in env:
        from tests.support import forked_ranks

        forked_ranks.fork_ranks(forked_ranks.run_rank)
    return cli.main()
