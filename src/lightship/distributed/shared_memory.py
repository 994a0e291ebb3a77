"""Checks the size of /dev/shm; in containers its default is 64 MiB."""

import os
from pathlib import Path

from lightship.errors import ConfigError

_MIB = 2**20
_MIB_PER_GPU = 128  # NCCL's buffers between two GPUs without peer-to-peer access


def check(gpus: int, path: str = "/dev/shm") -> None:
    """Refuse to start where NCCL would crash in its first collective with a bus error.

    Args:
        gpus: Processes on this node that each drive a GPU.
        path: Mount point of shared memory; not checked if it does not exist.

    Raises:
        ConfigError: Too little free space.
    """
    if gpus < 2 or not Path(path).is_dir():
        return
    mount = os.statvfs(path)
    free_mib = mount.f_bavail * mount.f_frsize // _MIB
    needed_mib = gpus * _MIB_PER_GPU
    if free_mib < needed_mib:
        raise ConfigError(
            f"{path} has {free_mib} MiB free; {gpus} GPUs on one node need {needed_mib} MiB: "
            f"docker run --shm-size={needed_mib}m, or in Kubernetes a volume at {path} of "
            f"'emptyDir: {{medium: Memory, sizeLimit: {needed_mib}Mi}}'"
        )
