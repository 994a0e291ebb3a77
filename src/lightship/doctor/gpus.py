"""Whether torch's CUDA fits the driver, and every process has a GPU."""

from pathlib import Path

import torch

from lightship.distributed.launcher import processes_here
from lightship.doctor.checks import Finding, skipped
from lightship.doctor.context import Context
from lightship.doctor.packages import major_minor

_GIVE_GPUS = "docker run --gpus all, in Kubernetes resources.limits nvidia.com/gpu"


def driver(context: Context) -> Finding:
    """Whether torch's CUDA fits the GPU driver."""
    number = getattr(torch._C, "_cuda_getDriverVersion", int)()
    version = (number // 1000, number % 1000 // 10) if number else None
    return compare_cuda(context.config.trainer.accelerator, torch.version.cuda, version)


def compare_cuda(
    accelerator: str,
    built_for: str | None,
    driver_cuda: tuple[int, int] | None,
    dev_path: str = "/dev",
) -> Finding:
    """The same, from versions.

    Args:
        accelerator: `--trainer.accelerator`.
        built_for: The CUDA version torch was built for; None: none.
        driver_cuda: (major, minor) of the newest CUDA the driver runs; None: no driver.
        dev_path: Folder of the device files.
    """
    if accelerator == "tpu":
        return skipped("--trainer.accelerator tpu: CUDA is not used")
    gpus = sorted(path.name for path in Path(dev_path).glob("nvidia[0-9]*"))
    needs_gpu = accelerator in ("gpu", "cuda")
    if built_for is None:
        if not gpus and not needs_gpu:
            return skipped("torch is built without CUDA, and there is no GPU")
        present = f"{len(gpus)} GPUs ({', '.join(gpus)})" if gpus else "no GPU"
        return Finding(
            "fail" if needs_gpu else "warn",
            f"torch is built without CUDA; {present} on this node",
            "no GPU is usable" if needs_gpu else "training would run on the CPU",
            "pip install torch torchvision --index-url https://download.pytorch.org/whl/cu126 "
            "(or the image of --target cuda), or set --trainer.accelerator cpu",
        )
    if driver_cuda is None:
        found = f"torch is built for CUDA {built_for}; no NVIDIA driver answers"
        if not gpus and not needs_gpu:
            return Finding("ok", found, "training runs on the CPU")
        fix = f"{_GIVE_GPUS}, or install the driver; without a GPU: --trainer.accelerator cpu"
        return Finding("fail", found, "no GPU is usable", fix)
    newest = f"{driver_cuda[0]}.{driver_cuda[1]}"
    found = f"torch is built for CUDA {built_for}; the driver runs up to {newest}"
    needed = major_minor(built_for)[0]
    if driver_cuda[0] >= needed:  # any minor version works (NVIDIA, "CUDA Compatibility")
        return Finding("ok", found, "compatible versions")
    return Finding(
        "fail",
        found,
        "CUDA does not start with a driver of an older major version",
        f"update the driver to one of CUDA {needed}, or install a torch built for CUDA "
        f"{driver_cuda[0]} (https://pytorch.org/get-started/previous-versions)",
    )


def gpus(context: Context) -> Finding:
    """Visible GPUs against requested processes. Creates no context on a GPU."""
    trainer = context.config.trainer
    if trainer.is_on_tpu:
        return skipped("--trainer.accelerator tpu: one process drives all chips of a host")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if trainer.accelerator in ("gpu", "cuda") and not seen:
        flags = f"--trainer.accelerator {trainer.accelerator}, --trainer.devices {trainer.devices}"
        fix = f"{_GIVE_GPUS}; or --trainer.accelerator cpu"
        return Finding("fail", f"0 GPUs visible; {flags}", "fit exits at once", fix)
    processes = processes_here(trainer)  # raises for more processes than GPUs
    if not context.on_gpus:
        word = "process" if processes == 1 else "processes"
        used = f"{seen} GPUs visible, none used" if seen else "no GPU visible"
        return Finding("ok", f"{used}, {processes} {word}", "training runs on the CPU")
    names = sorted({torch.cuda.get_device_name(index) for index in range(seen)})
    found = f"{seen} GPUs visible ({', '.join(names)}), {processes} processes requested"
    if processes < seen:
        fix = "--trainer.devices auto (and unset PET_NPROC_PER_NODE) to use all"
        return Finding("warn", found, f"{seen - processes} GPUs stay idle", fix)
    return Finding("ok", found, "one process per GPU")
