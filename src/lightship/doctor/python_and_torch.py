"""Whether Python, torch, torchvision, CUDA and the driver fit together."""

import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from lightship.doctor.check import Finding, skipped

_OLDEST_PYTHON = (3, 11)


def packages(path: Sequence[str] | None = None) -> Finding:
    """Python's version, and whether torchvision was built for the torch beside it.

    Args:
        path: Folders of packages; default: those this process imports from.
    """
    found = {
        name: next(iter(metadata.distributions(name=name, path=list(path or sys.path))), None)
        for name in ("torch", "torchvision", "lightning")
    }
    missing = [name for name, package in found.items() if package is None]
    if missing:
        return Finding(
            "fail",
            f"no package {', '.join(missing)}",
            "nothing can be trained",
            "pip install lightship in this environment",
        )
    versions = {name: package.version for name, package in found.items() if package}
    told = ", ".join(
        [f"Python {sys.version.split()[0]}", *(f"{name} {v}" for name, v in versions.items())]
    )
    if sys.version_info < _OLDEST_PYTHON:
        return Finding("fail", told, "lightship is not made for it", "install Python 3.11 or newer")
    vision = found["torchvision"]
    needs = [need for need in (vision and vision.requires) or [] if re.match(r"torch\b", need)]
    if wanted := re.search(r"([=>~]=) *(\d+\.\d+)", needs[0] if needs else ""):
        have = _major_minor(versions["torch"])
        want = _major_minor(wanted[2])
        if have < want or (wanted[1] == "==" and have != want):
            return Finding(
                "fail",
                told,
                f"this torchvision was built for torch {wanted[2]}: its operators fail to load",
                f"pip install 'torch=={wanted[2]}.*' 'torchvision=={versions['torchvision']}', "
                "both from the same index",
            )
    return Finding("ok", told, "they fit together")


def driver(
    accelerator: str,
    built_for: str | None,
    driver_cuda: tuple[int, int] | None,
    dev_path: str = "/dev",
) -> Finding:
    """Whether torch's CUDA and the GPU driver fit.

    Args:
        accelerator: `--trainer.accelerator`.
        built_for: The CUDA version torch was built for (torch.version.cuda); None: none.
        driver_cuda: (major, minor) of the newest CUDA the driver can run; None: no driver.
        dev_path: Where devices lie.
    """
    nodes = sorted(path.name for path in Path(dev_path).glob("nvidia[0-9]*"))
    needs_gpu = accelerator in ("gpu", "cuda")
    if accelerator == "tpu":
        return skipped("--trainer.accelerator tpu: no CUDA is used")
    if built_for is None:
        if nodes or needs_gpu:
            there = f"{len(nodes)} GPUs ({', '.join(nodes)})" if nodes else "no GPU"
            return Finding(
                "warn" if not needs_gpu else "fail",
                f"torch is built without CUDA; {there} here",
                "training would run on the CPU" if not needs_gpu else "no GPU can be used",
                "pip install torch torchvision --index-url https://download.pytorch.org/whl/cu126 "
                "(or the image of --target cuda), or set --trainer.accelerator cpu",
            )
        return skipped("torch is built without CUDA, and there is no GPU")
    if driver_cuda is None:
        return Finding(
            "fail" if needs_gpu or nodes else "ok",
            f"torch is built for CUDA {built_for}; no NVIDIA driver answers",
            "no GPU can be used" if needs_gpu or nodes else "training runs on the CPU",
            "docker run --gpus all, in Kubernetes resources.limits nvidia.com/gpu, or install the "
            "driver; without a GPU: --trainer.accelerator cpu"
            if needs_gpu or nodes
            else "",
        )
    told = f"torch is built for CUDA {built_for}; the driver runs up to {_dotted(driver_cuda)}"
    # Within a major version any driver will do (NVIDIA, "CUDA Compatibility").
    if driver_cuda[0] < _major_minor(built_for)[0]:
        return Finding(
            "fail",
            told,
            "CUDA does not start with a driver that is older by a major version",
            f"update the driver to one of CUDA {_major_minor(built_for)[0]}, or install a torch "
            f"built for CUDA {driver_cuda[0]} (https://pytorch.org/get-started/previous-versions)",
        )
    return Finding("ok", told, "they fit together")


def driver_here(accelerator: str) -> Finding:
    """`driver` with what this process sees."""
    import torch

    number = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else 0
    return driver(
        accelerator, torch.version.cuda, (number // 1000, number % 1000 // 10) if number else None
    )


def _major_minor(version: str) -> tuple[int, int]:
    numbers = [int(part) for part in re.findall(r"\d+", version)[:2]]
    return numbers[0], numbers[1] if len(numbers) > 1 else 0


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
