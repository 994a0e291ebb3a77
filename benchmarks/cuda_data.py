"""`make cuda-data`: what travels to the machine with the GPU beside the wheels, and its unpacking.

    python -m benchmarks.cuda_data CIFAR10.tar.xz TRASHNET.tar AIRBENCH_FOLDER

The archives hold train/CLASS/IMAGE and test/CLASS/IMAGE. Of TrashNet every third image travels:
rates need no more, and all that is sent must stay below 64 MiB. Nothing of it is committed.
"""

import os
import shutil
import sys
import tarfile
from pathlib import Path

from tests.support.images import little_set, put

FOLDER = Path("build/cuda")
CIFAR10, TRASHNET, AIRBENCH = "cifar10.tar.xz", "trashnet.tar", "airbench94_muon.py"
_EVERY = 3


def collect(cifar10: str = "", trashnet: str = "", airbench: str = "") -> None:
    """Copy into build/cuda what is given; an empty name leaves its part out."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if cifar10:
        shutil.copyfile(cifar10, FOLDER / CIFAR10)
    if trashnet:
        with tarfile.open(trashnet) as source, tarfile.open(FOLDER / TRASHNET, "w") as target:
            files = sorted((each for each in source if each.isfile()), key=lambda each: each.name)
            for member in files[::_EVERY]:
                target.addfile(member, source.extractfile(member))
    if airbench:
        shutil.copyfile(Path(airbench) / AIRBENCH, FOLDER / AIRBENCH)
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    for path in files:
        if path.parent == FOLDER:
            print(f"{path.stat().st_size / 2**20:6.1f} MiB  {path}")
    print(f"{sum(path.stat().st_size for path in files) / 2**20:6.1f} MiB  all of {FOLDER}")


def cifar10(data: str, folder: str, is_toy: bool) -> str | None:
    """The root of CIFAR-10's class folders, unpacked; None if it has not travelled."""
    if is_toy:
        return _toy(folder, (32, 32))
    return _unpacked(f"{data}/{CIFAR10}", f"{folder}/cifar10")


def trashnet(data: str, folder: str, is_toy: bool, copies: int) -> str | None:
    """The same of TrashNet, each training image `copies` times, so that an epoch is longer."""
    if is_toy:
        return _toy(folder, (40, 56))
    root = _unpacked(f"{data}/{TRASHNET}", f"{folder}/trashnet")
    for path in list(Path(root, "train").rglob("*.jpg")) if root else ():
        for copy in range(1, copies):
            os.link(path, path.with_name(f"{path.stem}-{copy}.jpg"))
    return root


def _unpacked(archive: str, folder: str) -> str | None:
    if not os.path.exists(archive):
        return None
    if not os.path.exists(folder):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder


def _toy(folder: str, size_px: tuple[int, int]) -> str:
    root = f"{folder}/toy-{size_px[0]}"
    if not os.path.exists(root):
        put(root, little_set(("train", "test"), per_class=8, size_px=size_px, image_format="jpg"))
    return root


if __name__ == "__main__":
    collect(*sys.argv[1:])
