"""Limits of the container: CPU and memory (cgroups, version 1 and 2) and /dev/shm."""

import shutil
from pathlib import Path

from lightship.distributed import shared_memory
from lightship.doctor.checks import Finding, skipped
from lightship.doctor.context import Context
from lightship.host import Limits, cores_within, read_limits, visible_cores

_GIB = 2**30
_PROCESS_BYTES = 3 * _GIB // 4  # of Python, torch and Lightning alone


def cpu(context: Context, limits: Limits | None = None) -> Finding:
    """Whether the processes' threads have the cores they count on, in this or another container."""
    limits = limits or read_limits()
    processes, visible = context.processes_or_one, visible_cores()
    cpus = limits.cpus or visible
    limit = f"limit {limits.cpus:g}" if limits.cpus else "no limit"
    found = f"{visible} cores visible; {limit} ({limits.source})"
    raise_limit = "raise the CPU limit (resources.limits.cpu, docker run --cpus)"
    if cpus < processes:
        fix = f"{raise_limit} to {processes} or more, or fewer processes (--trainer.devices)"
        return Finding("warn", f"{found}; {processes} processes", "they take turns", fix)
    share = max(1, cores_within(visible, limits) // processes)
    threads = context.config.data.decode_threads or share
    if threads > 2 * share:
        return Finding(
            "warn",
            f"{found}; {threads} decoding threads per process",
            f"more than the {share} cores per process, so they wait for each other",
            f"leave --data.decode_threads out or set {share}"
            + (f", or {raise_limit}" if limits.cpus else ""),
        )
    return Finding("ok", found, f"{cpus / processes:g} cores per process")


def memory(context: Context, limits: Limits | None = None) -> Finding:
    """Whether the memory limit of this or another container lets the processes start."""
    limits, processes = limits or read_limits(), context.processes_or_one
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


def shared(context: Context, path: str = "/dev/shm") -> Finding:
    """Whether shared memory has room for NCCL's buffers.

    Raises:
        ConfigError: It has not; names the fix.
    """
    if not context.on_gpus or (processes := context.processes_or_one) < 2:
        return skipped("only several processes on GPUs use it")
    if not Path(path).is_dir():
        return skipped(f"there is no {path}")
    shared_memory.check(processes, path)
    free_mib = shutil.disk_usage(path).free // 2**20
    return Finding("ok", f"{path} has {free_mib} MiB free", f"enough for {processes} GPUs")
