"""Limits of this machine and its container: CPU and memory (cgroups, version 1 and 2)."""

import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED_BYTES = 2**60  # version 1 writes a number of this order where there is no limit


@dataclass(frozen=True)
class Limits:
    """What the kernel allows this process and those beside it.

    Attributes:
        cpus: CPU time in cores; None: no limit.
        memory_bytes: Of all processes of the container; None: no limit.
        source: `cgroup v2`, `cgroup v1` or `no cgroup`.
    """

    cpus: float | None
    memory_bytes: int | None
    source: str


def read_limits(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> Limits:
    """The tightest limits of this process's cgroups and their parents.

    Args:
        root: Where cgroups are mounted.
        own: The file that names this process's.
    """
    mount, own_path = Path(root), Path(own)
    cgroups: dict[str, str] = {}
    for line in own_path.read_text().splitlines() if own_path.exists() else ():
        _, controllers, cgroup = line.split(":", 2)
        cgroups |= dict.fromkeys(controllers.split(","), cgroup)  # "" for version 2
    is_v2 = (mount / "cgroup.controllers").exists()

    def folders(controller: str) -> Iterator[Path]:
        if is_v2:
            return _upwards(mount, cgroups.get("", "/"))
        mounts = (path for path in mount.glob("*") if controller in path.name.split(","))
        return _upwards(next(mounts, None), cgroups.get(controller, "/"))

    cpus, memory, seen = [], [], False
    for folder in folders("cpu"):
        seen = True
        quota = _numbers(folder, "cpu.max") or _numbers(
            folder, "cpu.cfs_quota_us", "cpu.cfs_period_us"
        )
        if len(quota) == 2:
            cpus.append(quota[0] / quota[1])
    for folder in folders("memory"):
        seen = True
        memory += _numbers(folder, "memory.max") or _numbers(folder, "memory.limit_in_bytes")
    source = "cgroup v2" if is_v2 else "cgroup v1" if seen else "no cgroup"
    memory = [limit for limit in memory if 0 < limit < _UNLIMITED_BYTES]
    return Limits(min(cpus, default=None), min(memory, default=None), source)


def _upwards(mount: Path | None, cgroup: str) -> Iterator[Path]:
    """The folders of a cgroup and its parents, as far as this container shows them."""
    if mount is None:
        return
    parts = [part for part in cgroup.split("/") if part and part != ".."]
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _numbers(folder: Path, *files: str) -> list[int]:
    """The numbers in these files; none where a word is no number (`max`, -1) or a file missing."""
    paths = [folder / file for file in files]
    words = " ".join(path.read_text() for path in paths if path.exists()).split()
    return [int(word) for word in words] if all(map(str.isdecimal, words)) else []


def visible_cores() -> int:
    """CPU cores on which the kernel may run this process."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@functools.cache
def usable_cores() -> int:
    """Threads for which this process and its children have CPU time at once, at least 1.

    More than a container's limit would be throttled together for a part of each tenth of a second.
    """
    return cores_within(visible_cores(), read_limits())


def cores_within(visible: int, limits: Limits) -> int:
    """`visible` cores, or fewer by the limit: whole ones, at least 1."""
    return visible if limits.cpus is None else max(1, min(visible, int(limits.cpus)))


def usable_memory_bytes(limits: Limits) -> int | None:
    """Memory that may be used on this node: the smaller of limit and machine; None: unknown."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    total = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")]
    return min([*total, *filter(None, [limits.memory_bytes])], default=None)
