"""The container's limits: CPU and memory (cgroups, version 1 and 2) and /dev/shm."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lightship.distributed import shared_memory
from lightship.doctor.check import Finding, skipped

_GIB = 2**30
_LEAST_BYTES = 3 * _GIB // 4
"""What one process takes with Python, torch and Lightning alone."""
_NO_LIMIT_BYTES = 2**60  # version 1 writes a number of this order where there is none


@dataclass(frozen=True)
class Limits:
    """What the kernel allows this process and its kin.

    Attributes:
        cpus: Cores' worth of time; None: no limit.
        memory_bytes: Of all processes of the container; None: no limit.
        told_by: `cgroup v2`, `cgroup v1` or `no cgroup`.
    """

    cpus: float | None
    memory_bytes: int | None
    told_by: str


def read_limits(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> Limits:
    """The tightest limits of this process's cgroups and of all above them.

    Args:
        root: Where cgroups are mounted.
        own: The file that names this process's.
    """
    where = _own_paths(Path(own))
    if (Path(root) / "cgroup.controllers").exists():
        folders = list(_upwards(Path(root), where.get("", "/")))
        cpus = [limit for folder in folders if (limit := _cpu_max(folder / "cpu.max"))]
        memory = [limit for folder in folders if (limit := _number(folder / "memory.max"))]
        return Limits(min(cpus, default=None), min(memory, default=None), "cgroup v2")
    mounts = {name: _controller(Path(root), name) for name in ("cpu", "memory")}
    if not any(mounts.values()):
        return Limits(None, None, "no cgroup")
    cpu_folders = _upwards(mounts["cpu"], where.get("cpu", "/")) if mounts["cpu"] else ()
    cpus = []
    for folder in cpu_folders:
        quota, period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota and period:
            cpus.append(quota / period)
    memory_folders = (
        _upwards(mounts["memory"], where.get("memory", "/")) if mounts["memory"] else ()
    )
    memory = [
        limit
        for folder in memory_folders
        if (limit := _number(folder / "memory.limit_in_bytes")) and limit < _NO_LIMIT_BYTES
    ]
    return Limits(min(cpus, default=None), min(memory, default=None), "cgroup v1")


def usable_memory_bytes(limits: Limits, meminfo: str = "/proc/meminfo") -> int | None:
    """What a fit may use on this machine: the smaller of the limit and the machine's memory."""
    total = None
    if Path(meminfo).exists():
        for line in Path(meminfo).read_text().splitlines():
            if line.startswith("MemTotal:"):
                total = int(line.split()[1]) * 1024
    known = [each for each in (limits.memory_bytes, total) if each]
    return min(known, default=None)


def cpu(limits: Limits, processes: int, decode_threads: int) -> Finding:
    """Whether the processes' threads have the cores they count on."""
    seen = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    cpus = limits.cpus or seen
    told = f"{seen} cores seen; " + (
        f"limit {limits.cpus:g} ({limits.told_by})"
        if limits.cpus
        else f"no limit ({limits.told_by})"
    )
    if cpus < processes:
        return Finding(
            "warn",
            f"{told}; {processes} processes",
            "they wait for each other's turn",
            f"raise the CPU limit (resources.limits.cpu, docker run --cpus) to {processes} or "
            "more, or start fewer processes (--trainer.devices)",
        )
    share = max(1, int(cpus / processes))
    threads = decode_threads or max(1, seen // processes)
    if limits.cpus and threads > 2 * share:
        return Finding(
            "warn",
            f"{told}; {threads} decoding threads a process",
            "threads count the cores seen, not the limit, and are stopped when it is used up",
            f"--data.decode_threads {share} and OMP_NUM_THREADS={share}, or raise the CPU limit "
            "(resources.limits.cpu, docker run --cpus)",
        )
    return Finding("ok", told, f"{cpus / processes:g} cores a process")


def memory(limits: Limits, processes: int) -> Finding:
    """Whether the processes can so much as start."""
    needed = processes * _LEAST_BYTES
    if limits.memory_bytes is None:
        return Finding("ok", f"no limit ({limits.told_by})", "the machine's memory is the limit")
    told = f"limit {limits.memory_bytes / _GIB:.2f} GiB ({limits.told_by})"
    if limits.memory_bytes < needed:
        return Finding(
            "fail",
            told,
            f"the kernel kills {processes} processes of {_LEAST_BYTES / _GIB:g} GiB, which torch "
            "alone takes",
            f"raise the memory limit (resources.limits.memory, docker run --memory) to "
            f"{needed / _GIB + 1:.0f} GiB or more",
        )
    return Finding("ok", told, f"{limits.memory_bytes / processes / _GIB:.1f} GiB a process")


def shared(processes_on_gpus: int, path: str = "/dev/shm") -> Finding:
    """Whether /dev/shm holds what NCCL puts there. Raises ConfigError if not, with the remedy."""
    if processes_on_gpus < 2:
        return skipped("only several processes on GPUs use it")
    if not Path(path).is_dir():
        return skipped(f"there is no {path}")
    shared_memory.check(processes_on_gpus, path)
    mount = os.statvfs(path)
    free_mib = mount.f_bavail * mount.f_frsize // 2**20
    return Finding("ok", f"{path} has {free_mib} MiB free", f"enough for {processes_on_gpus} GPUs")


def _own_paths(path: Path) -> dict[str, str]:
    """Controller ("" for version 2) -> this process's cgroup."""
    if not path.exists():
        return {}
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        _, controllers, cgroup = line.split(":", 2)
        found |= dict.fromkeys(controllers.split(","), cgroup)
    return found


def _upwards(mount: Path, cgroup: str) -> Iterator[Path]:
    """The folders of a cgroup and of those above it, as far as this container shows them."""
    parts = [part for part in cgroup.split("/") if part and part != ".."]
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _controller(root: Path, name: str) -> Path | None:
    folders = (path for path in root.glob("*") if name in path.name.split(","))
    return next(folders, None)


def _cpu_max(path: Path) -> float | None:
    """`QUOTA PERIOD` in microseconds, or `max PERIOD`."""
    words = path.read_text().split() if path.exists() else []
    if len(words) != 2 or not words[0].isdecimal():
        return None
    return int(words[0]) / int(words[1])


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no file, or a word or a negative number in it."""
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdecimal() else None
