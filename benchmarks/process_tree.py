"""What a process and all its descendants cost: CPU seconds and memory (Linux: read from /proc)."""

import os
from collections import defaultdict
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """The process and all that descend from it, those that ended but were not waited for too."""
    children = defaultdict(list)
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children[int(fields[1])].append(int(entry.name))
    found = [pid]
    for each in found:
        found.extend(children[each])
    return found


def cpu_s(pid: int) -> float:
    """User and system seconds of the family, and of those of it that ended and were waited for."""
    stats = (_stat(each) for each in family(pid))
    return sum(sum(map(int, fields[11:15])) for fields in stats if fields) * _TICK_S


def memory_mib(pid: int) -> float:
    """Proportional set size of the family: a page that n processes share counts once in all."""
    total_kib = 0
    for each in family(pid):
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        except OSError:  # it ended meanwhile
            continue
        total_kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total_kib / 1024


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()
