"""One measurement of the stream table: an arm in a fresh process, watched from outside."""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import stream_peers
from benchmarks.process_tree import cpu_s, memory_mib
from benchmarks.stream_proxy import LatencyProxy
from tests.support.s3 import S3Server

EPOCHS = int(os.environ.get("EPOCHS", "2"))
EPOCH_LIMIT_S = float(os.environ.get("EPOCH_LIMIT_S", "120"))
START_LIMIT_S = 120.0
SPLIT_CORES = os.environ.get("SPLIT_CORES", "") not in ("", "0")
_CORES = sorted(os.sched_getaffinity(0))  # before this process is given a part of them
SAMPLE_S = 1.0  # reading the page tables of a large process takes a while
Result = dict[str, Any]
"""What an arm printed, with what the harness saw of it; or {"failed": why} or {"not_run": why}."""


@dataclass(frozen=True)
class Arm:
    """A module with its mode, what it reads, and the peer whose environment runs it."""

    module: str
    reads: str
    mode: str = ""
    peer: str = ""


def cores() -> tuple[set[int], set[int]]:
    """Those of the server and the proxy before it, and those of the arms.

    The same for both, unless SPLIT_CORES asks for a half each: a bucket's own work is not done on
    the machine that trains.
    """
    if not SPLIT_CORES:
        return set(_CORES), set(_CORES)
    assert len(_CORES) > 1, "SPLIT_CORES needs two cores"
    return set(_CORES[: len(_CORES) // 2]), set(_CORES[len(_CORES) // 2 :])


@contextmanager
def _endpoint(s3: S3Server, delay_ms: int) -> Iterator[str]:
    """The server's own for no delay, else that of a proxy before it."""
    if not delay_ms:
        yield s3.endpoint
        return
    with LatencyProxy(s3.endpoint, delay_ms / 1000) as proxy:
        yield proxy.endpoint


def measure(arm: Arm, root: str, s3: S3Server, delay_ms: int) -> Result:
    """Run the arm in a fresh process with empty caches; bounded by the limits of its epochs."""
    cache = Path(tempfile.mkdtemp(prefix="stream-cache-"))
    command = [stream_peers.python_of(arm.peer), "-m", f"benchmarks.stream_{arm.module}"]
    command += [root, arm.mode, str(cache / "data"), str(EPOCHS), str(EPOCH_LIMIT_S)]
    try:
        with _endpoint(s3, delay_ms) as endpoint, (cache / "stderr").open("w+") as stderr:
            (cache / "data").mkdir()
            env = os.environ | s3.environment("reader")
            env |= {"AWS_ENDPOINT_URL": endpoint, "S3_ENDPOINT_URL": endpoint}
            env |= {"OMP_NUM_THREADS": "1", "HOME": str(cache), "PYTHONUNBUFFERED": "1"}
            before = (*s3.traffic(), cpu_s(s3.process.pid))
            process = subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True,
                start_new_session=True,
                preexec_fn=partial(os.sched_setaffinity, 0, cores()[1]),
            )  # fmt: skip
            result = _watch(process, s3, before)
            stderr.seek(0)
            return result if result else failure(stderr.read(), process.returncode)
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def _watch(process: subprocess.Popen, s3: S3Server, before: tuple) -> Result:
    """Read the arm's lines to their end; empty if it did not reach its result."""
    peak_mib, ended = [0.0], threading.Event()

    def sample_memory() -> None:
        while not ended.wait(SAMPLE_S):
            peak_mib[0] = max(peak_mib[0], memory_mib(process.pid))

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    sampler = threading.Thread(target=sample_memory, daemon=True)
    watchdog = threading.Timer(EPOCHS * EPOCH_LIMIT_S + START_LIMIT_S, kill)
    sampler.start()
    watchdog.start()
    traffic, result = (0, 0), {}
    try:
        for line in process.stdout or ():
            if line.startswith('{"images": '):
                result, traffic = json.loads(line), s3.traffic()
                server_s = cpu_s(s3.process.pid) - before[2]
        process.wait()
    finally:
        watchdog.cancel()
        kill()  # workers that their owner left behind
        ended.set()
        sampler.join()
    if process.returncode or not result:
        return {}
    return result | {
        "requests": traffic[0] - before[0],
        "sent_bytes": traffic[1] - before[1],
        "server_cpu_s": server_s,
        "peak_rss_mib": peak_mib[0],
    }


def failure(stderr: str, code: int | None = None) -> Result:
    """The exception's line of a traceback, or the last line; an absent lightship is not run."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Timeout)\b", line)]
    line = (errors or lines or ["no word of why"])[-1][:160]
    if re.search(r"No module named 'lightship\.|cannot import name .* from 'lightship", line):
        return {"not_run": line}
    if code is not None and code < 0:
        line = f"ended by {signal.Signals(-code).name}: {line}"
    return {"failed": line}
