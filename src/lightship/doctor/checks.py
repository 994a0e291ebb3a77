"""The checks of `lightship doctor`, in the order of the table."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from lightship.doctor.context import Context

Status = Literal["ok", "warn", "fail", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        status: `warn`: a fit starts, but probably not as intended; `fail`: it stops or is useless;
            `skipped`: not checked, and `found` says why.
        found: What was seen.
        means: The effect on a fit.
        fix: What to change; empty where nothing needs to.
    """

    status: Status
    found: str
    means: str = ""
    fix: str = ""


def skipped(why: str) -> Finding:
    """A finding of nothing, and why."""
    return Finding("skipped", why)


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        name: What is checked.
        look: Checks it. A LightshipError is a failure, and its text is what was found.
        means: The effect of a failure that `look` does not explain itself, on a fit.
        fix: What to change then.
        deadline_s: Bound, from the start of all checks.
        if_late: Status without a result by then.
        needs_imports: Whether `look` uses torch, or a module that imports it.
        needs_config: Whether it needs a valid configuration.
    """

    name: str
    look: Callable[[Context], Finding]
    means: str
    fix: str
    deadline_s: float = 20.0  # with Python's start and exit below 30 s
    if_late: Status = "fail"
    needs_imports: bool = True
    needs_config: bool = True


def _in(module: str, function: str) -> Callable[[Context], Finding]:
    """A function of this folder, imported when it is called: torch may be slow, or missing."""
    return lambda run: run.once(getattr(import_module(f"lightship.doctor.{module}"), function))


_EXITS = "fit exits with code 78"
_NO_STEP = "fit exits before its first step"
_REACH = (
    "correct the address (AWS_ENDPOINT_URL), and allow requests through firewall, NetworkPolicy "
    "and proxy to the storage at"
)
CHECKS = [
    Check("configuration", _in("configuration", "configuration"), _EXITS,
          "change the named flag, or its line in the YAML; if late, see the other late checks",
          if_late="warn", needs_config=False),
    Check("packages", _in("packages", "packages"), "fit cannot start",
          "install lightship in a new environment: pip install . in its checkout",
          deadline_s=15, needs_imports=False, needs_config=False),
    Check("imports", _in("packages", "imports"), "fit cannot start",
          "install lightship in a new environment on a local disk: pip install . in its checkout",
          needs_imports=False, needs_config=False),
    Check("GPU driver", _in("gpus", "driver"), "no GPU is usable",
          "check that nvidia-smi answers; restart the node's driver", needs_config=False),
    Check("GPUs", _in("gpus", "gpus"), _EXITS,
          "--trainer.devices auto (and unset PET_NPROC_PER_NODE), or request more GPUs: docker run "
          "--gpus all, in Kubernetes resources.limits nvidia.com/gpu"),
    Check("CPU", _in("container", "cpu"), "number of cores unknown", "see imports"),
    Check("memory limit", _in("container", "memory"), "memory limit unknown", "see imports"),
    Check("/dev/shm", _in("container", "shared"), "NCCL fails with a bus error at once",
          "docker run --shm-size=1g, in Kubernetes an emptyDir of medium Memory at /dev/shm"),
    Check("rendezvous", _in("rendezvous", "rendezvous"), "the nodes cannot find each other",
          "set PET_NNODES and PET_RDZV_ENDPOINT=HOST:PORT of node 0, the same on all nodes"),
    Check("all-reduce", _in("allreduce", "all_reduce"), "the first step would hang",
          "see NCCL_DEBUG=INFO", deadline_s=24),
    Check("data", _in("data", "speed"), _NO_STEP,
          f"{_REACH} --data.root; for a local folder check its mount"),
    Check("data set", _in("data", "data_set"), "fit exits with code 65",
          "fix the data that is named, or correct --data.root", if_late="skipped"),
    Check("output", _in("output", "writable"), _NO_STEP, f"{_REACH} --run.output",
          deadline_s=15, needs_imports=False),
    Check("run at output", _in("output", "existing_run"), _EXITS,
          "give another --run.output, or the settings of the run that is there"),
    Check("clock", _in("output", "clock"), "S3 rejects requests signed 15 minutes apart",
          "see output", deadline_s=15, if_late="skipped", needs_imports=False),
    Check("W&B key", _in("tracking", "wandb"), _EXITS,
          "correct the WANDB_* variable, pip install wandb, or set --run.tracking none",
          if_late="warn"),
    Check("fine-tuning", _in("fine_tuning", "fine_tuning"), _EXITS,
          "set --model.weights to a file of weights of --model.net", if_late="skipped"),
    Check("model memory", _in("memory", "model_memory"), _NO_STEP,
          "change --model.net or --data.image_size_px as named", if_late="warn"),
    Check("cache disk", _in("disk", "cache"), "the archive cannot be downloaded",
          "correct --data.root"),
]  # fmt: skip
