"""Limits of the container: CPU and memory (cgroups, version 1 and 2) and /dev/shm."""

import os
import sys
from pathlib import Path

from lightship.devices.host import Limits, read_limits
from lightship.distributed import shared_memory
from lightship.doctor.checks import Finding, skipped
from lightship.doctor.context import Context

_GIB = 2**30
_PROCESS_BYTES = 3 * _GIB // 4  # of Python, torch and Lightning alone


def cpu(context: Context) -> Finding:
    """Whether the processes' threads have the cores they count on."""
    threads = context.config.data.decode_threads
    return compare_cpu(read_limits(), context.processes_or_one, threads)


def compare_cpu(limits: Limits, processes: int, decode_threads: int) -> Finding:
    """The same, of these limits."""
    visible = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    cpus = limits.cpus or visible
    limit = f"limit {limits.cpus:g}" if limits.cpus else "no limit"
    found = f"{visible} cores visible; {limit} ({limits.source})"
    raise_limit = "raise the CPU limit (resources.limits.cpu, docker run --cpus)"
    if cpus < processes:
        fix = f"{raise_limit} to {processes} or more, or fewer processes (--trainer.devices)"
        return Finding("warn", f"{found}; {processes} processes", "they take turns", fix)
    share = max(1, int(cpus / processes))
    threads = decode_threads or max(1, visible // processes)
    if limits.cpus and threads > 2 * share:
        return Finding(
            "warn",
            f"{found}; {threads} decoding threads per process",
            "thread counts follow the visible cores, and are throttled at the limit",
            f"--data.decode_threads {share} and OMP_NUM_THREADS={share}, or {raise_limit}",
        )
    return Finding("ok", found, f"{cpus / processes:g} cores per process")


def memory(context: Context) -> Finding:
    """Whether the memory limit lets the processes start."""
    return compare_memory(read_limits(), context.processes_or_one)


def compare_memory(limits: Limits, processes: int) -> Finding:
    """The same, of these limits."""
    if limits.memory_bytes is None:
        return Finding("ok", f"no limit ({limits.source})", "the machine's memory is the limit")
    found = f"limit {limits.memory_bytes / _GIB:.2f} GiB ({limits.source})"
    needed = processes * _PROCESS_BYTES
    if limits.memory_bytes >= needed:
        each = limits.memory_bytes / processes / _GIB
        return Finding("ok", found, f"{each:.1f} GiB per process")
    return Finding(
        "fail",
        found,
        f"the kernel kills {processes} processes of {_PROCESS_BYTES / _GIB:g} GiB, which torch "
        "alone takes",
        "raise the memory limit (resources.limits.memory, docker run --memory) to "
        f"{needed / _GIB + 1:.0f} GiB or more",
    )


def shared(context: Context) -> Finding:
    """Whether /dev/shm has room for NCCL's buffers."""
    return check_shared(context.processes_or_one if context.on_gpus else 0)


def check_shared(processes_on_gpus: int, path: str = "/dev/shm") -> Finding:
    """The same, at a path. Raises ConfigError, with the fix, without room."""
    if processes_on_gpus < 2:
        return skipped("only several processes on GPUs use it")
    if not Path(path).is_dir():
        return skipped(f"there is no {path}")
    shared_memory.check(processes_on_gpus, path)
    mount = os.statvfs(path)
    free_mib = mount.f_bavail * mount.f_frsize // 2**20
    return Finding("ok", f"{path} has {free_mib} MiB free", f"enough for {processes_on_gpus} GPUs")
