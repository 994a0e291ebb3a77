"""Runs mutated files through one reader in a child process, and reports how each call ended.

A call may return or raise a `LightshipError`. Anything else is a finding: another exception, the
child's death by a signal, memory or processor time above the target's bounds, or a hang.
"""

import ctypes
import faulthandler
import logging
import mmap
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lightship.errors import LightshipError
from tests.fuzz.mutate import mutated

_HANG_S = 120
_STATE = struct.Struct("<qdqqqq")  # number, its start, returned, refused, peak bytes, peak µs


@dataclass(frozen=True)
class Target:
    """A reader and valid files for it.

    Attributes:
        name: Of the kind of file.
        seeds: Makes the valid files; called once.
        read: Reads one file, given its bytes and an empty folder.
        max_mib: How much memory a call may take.
        max_cpu_s: How much processor time a call may take.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    read: Callable[[bytes, Path], object]
    max_mib: int = 256
    max_cpu_s: float = 10


@dataclass
class Outcome:
    """What became of a range of files."""

    returned: int = 0
    refused: int = 0
    peak_mib: float = 0
    peak_cpu_s: float = 0
    findings: list[str] = field(default_factory=list)

    def add(self, other: "Outcome") -> None:
        self.returned += other.returned
        self.refused += other.refused
        self.peak_mib = max(self.peak_mib, other.peak_mib)
        self.peak_cpu_s = max(self.peak_cpu_s, other.peak_cpu_s)
        self.findings += other.findings


def file_of(target: Target, seeds: Sequence[bytes], seed: int, number: int) -> bytes:
    """The mutated file of this number; the same on every call."""
    rng = random.Random(f"{target.name} {seed} {number}")
    return mutated(seeds[number % len(seeds)], rng)


def seeds_of(target: Target) -> list[bytes]:
    """The valid files, made in a child: this process must have no threads when it forks."""
    child, read = _forked(partial(_write_seeds, target))
    with os.fdopen(read, "rb") as stream:
        data = stream.read()
    os.waitpid(child, 0)
    return pickle.loads(data)


def _write_seeds(target: Target, write: int) -> None:
    with os.fdopen(write, "wb") as stream:
        pickle.dump(list(target.seeds()), stream)


def _forked(work: Callable[[int], object]) -> tuple[int, int]:
    """Calls `work` with a pipe's end in a child: (its process, the end to read from)."""
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        return child, read
    os.close(read)
    code = 1
    try:
        libc = ctypes.CDLL(None)
        libc.prctl(1, signal.SIGKILL)  # die with the tests
        for setting in (-1, -3):  # freed memory is returned, or what a call takes would not show:
            libc.mallopt(setting, 2**17)  # a training in this process may have had it kept
        work(write)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def fuzz(target: Target, numbers: range, seed: int, folder: Path) -> Outcome:
    """Reads the files `numbers`; those with a finding are kept in `folder`."""
    seeds = seeds_of(target)
    outcome, first = Outcome(), numbers.start
    kept = folder / "findings"
    kept.mkdir(parents=True, exist_ok=True)
    while first < numbers.stop:
        state = mmap.mmap(-1, _STATE.size)
        state[:] = _STATE.pack(first, time.monotonic(), 0, 0, 0, 0)
        left = range(first, numbers.stop)
        child, read = _forked(partial(_read_all, target, seeds, seed, left, folder, state))
        end = _wait(child, state, target)
        with os.fdopen(read, errors="replace") as lines:
            findings = lines.read().split("\0")[:-1]
        reached, _, returned, refused, peak_bytes, peak_us = _STATE.unpack(state[:])
        outcome.add(Outcome(returned, refused, peak_bytes / 2**20, peak_us / 1e6, findings))
        if end:
            outcome.findings.append(f"{target.name} {seed} {reached}: {end}")
        for text in findings + ([outcome.findings[-1]] if end else []):
            number = int(text.split(":")[0].split()[-1])
            (kept / f"{target.name}-{seed}-{number}").write_bytes(
                file_of(target, seeds, seed, number)
            )
        first = reached + 1
    return outcome


def _wait(child: int, state: mmap.mmap, target: Target) -> str:
    """Waits for the child; returns how it was lost, or "" if it has read all files."""
    ticks = os.sysconf("SC_CLK_TCK")
    number, used_before = -1, 0.0
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return "" if status == 0 else f"the process ended with {_shown(status)}"
        now, started_s, *_ = _STATE.unpack(state[:])
        stat = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        used = (int(stat[11]) + int(stat[12])) / ticks
        if now != number:
            number, used_before = now, used
        is_long = used - used_before > 2 * target.max_cpu_s
        if is_long or time.monotonic() - started_s > _HANG_S:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"no end after {used - used_before:.0f} s of processor time"
        time.sleep(0.05)


def _shown(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return signal.Signals(-code).name if code < 0 else f"code {code}"


def _read_all(
    target: Target,
    seeds: Sequence[bytes],
    seed: int,
    numbers: range,
    folder: Path,
    state: mmap.mmap,
    findings: int,
) -> None:
    logging.disable(logging.CRITICAL)
    faulthandler.disable()
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    bound = _memory("VmSize") + 8 * target.max_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    case = folder / f"case-{os.getpid()}"
    returned = refused = peak_bytes = peak_us = 0
    for number in numbers:
        data = file_of(target, seeds, seed, number)
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir(parents=True)
        state[:] = _STATE.pack(number, time.monotonic(), returned, refused, peak_bytes, peak_us)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, started_s = _memory("VmRSS"), time.process_time()
        problem = ""
        try:
            target.read(data, case)
            returned += 1
        except LightshipError as error:
            refused += 1
            problem = "" if str(error) else "an error without words"
        except BaseException:
            problem = traceback.format_exc()
        used_s, taken = time.process_time() - started_s, _memory("VmHWM") - before
        peak_bytes, peak_us = max(peak_bytes, taken), max(peak_us, int(used_s * 1e6))
        if not problem and taken > target.max_mib * 2**20:
            problem = f"{taken / 2**20:.0f} MiB of memory, more than {target.max_mib}"
        if not problem and used_s > target.max_cpu_s:
            problem = f"{used_s:.1f} s of processor time, more than {target.max_cpu_s}"
        if problem:
            os.write(findings, f"{target.name} {seed} {number}: {problem}\0".encode())
    state[:] = _STATE.pack(number, time.monotonic(), returned, refused, peak_bytes, peak_us)
    shutil.rmtree(case, ignore_errors=True)


def _memory(name: str) -> int:
    """Bytes, by the name that /proc gives them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)
