"""What a run ran on: versions, device, processors, commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from lightship import __version__
from lightship.distributed import comm


def environment_facts() -> dict[str, Any]:
    """Versions, device, processors and git commit of this process, as plain values. Any rank."""
    packages = ("torch", "torchvision", "lightning")
    # Its own is not asked of the installed packages: it may run from a checkout on PYTHONPATH.
    facts: dict[str, Any] = {"python": platform.python_version(), "lightship": __version__}
    facts |= {package: importlib.metadata.version(package) for package in packages}
    if torch.cuda.is_available():
        facts |= {
            "device": torch.cuda.get_device_name(),
            "gpu_count": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
        }
    else:
        facts["device"] = _processor_name()
    facts["cpu_count"] = comm.node_cores()
    facts["world_size"] = int(os.environ.get("WORLD_SIZE", "1"))
    facts["platform"] = platform.platform()
    facts["git_commit"] = git_commit()
    return facts


def git_commit(timeout_s: float = 5.0) -> str | None:
    """Commit checked out in the working directory; None without git, a repository or an answer."""
    command = ["git", "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor_name() -> str:
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
