"""Whether there are GPUs, or cores, for the processes asked for."""

from lightship.config import Config
from lightship.doctor.check import Finding, skipped


def gpus_for_processes(config: Config) -> Finding:
    """GPUs seen against processes asked for. Needs torch; makes no context on a GPU."""
    import torch

    from lightship.distributed.launcher import is_on_gpus, processes_here

    asked = config.trainer
    if asked.is_on_tpu:
        return skipped("--trainer.accelerator tpu: one process drives all chips of a host")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked.accelerator in ("gpu", "cuda") and not seen:
        return Finding(
            "fail",
            f"0 GPUs seen; --trainer.accelerator {asked.accelerator}, --trainer.devices "
            f"{asked.devices}",
            "a fit ends at once",
            "docker run --gpus all, in Kubernetes resources.limits nvidia.com/gpu; or "
            "--trainer.accelerator cpu",
        )
    processes = processes_here(config.trainer)  # raises for more processes than GPUs
    if is_on_gpus(asked.accelerator):
        names = sorted({torch.cuda.get_device_name(index) for index in range(seen)})
        told = f"{seen} GPUs ({', '.join(names)}) seen, {processes} processes asked for"
        if processes < seen:
            return Finding(
                "warn",
                told,
                f"{seen - processes} GPUs stay idle",
                "--trainer.devices auto (and unset PET_NPROC_PER_NODE) to use all",
            )
        return Finding("ok", told, "one process a GPU")
    word = "process" if processes == 1 else "processes"
    return Finding("ok", f"no GPU seen, {processes} {word} asked for", "training runs on the CPU")
