"""Runs a command in one process or several.

One device: in this process. More: by torch elastic's agent on each node, which starts `python -m
lightship` once per device and is configured by torchrun's PET_* variables. Under another launcher
(torchrun, SLURM) and on TPUs nothing is launched here.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lightship import host
from lightship.config import TrainerConfig
from lightship.distributed import shared_memory, slurm
from lightship.distributed.signals import Phase, StopRequest
from lightship.errors import ConfigError, Diverged, LightshipError, PeerLost, Preempted

_AGENT_PID = "LIGHTSHIP_AGENT_PID"
_ONE_NODE = ("1", "1:1")
_PR_SET_PDEATHSIG = 1


def launch(
    work: Callable[[], None],
    trainer: TrainerConfig,
    arguments: Sequence[str],
    is_worker: bool,
    resumes_from: str | None,
) -> None:
    """Run `work` in as many processes as configured. Blocks until it is done.

    Args:
        work: Called in each process, once it has joined the process group.
        trainer: Devices and timeouts.
        arguments: Command line of the workers.
        is_worker: `is_worker()`.
        resumes_from: What a restarted worker resumes from; None: it starts from scratch.

    Raises:
        LightshipError: See errors.py for its exit code.
    """
    _check_gpus(trainer.accelerator)
    if is_worker:
        _join_and(work, trainer)
    elif trainer.is_on_tpu:
        if _is_one_of_several_tpu_hosts():
            _join_and(work, trainer)
        else:
            work()
    else:
        processes = processes_here(trainer)
        if processes == 1 and os.environ.get("PET_NNODES", "1") in _ONE_NODE:
            _keep_to_cpu_limit(host.visible_cores(), host.usable_cores())
            work()
            return
        StopRequest(Phase.LAUNCH).install()
        from lightship.distributed.elastic_agent import run_agent

        if is_on_gpus(trainer.accelerator):
            shared_memory.check(processes)
        os.environ[_AGENT_PID] = str(os.getpid())
        run_agent(processes, arguments, resumes_from)


def _keep_to_cpu_limit(visible: int, usable: int) -> None:
    """Have torch use no more threads than the container has CPU time for: it counts all cores."""
    if usable < visible and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(usable)


def _join_and(work: Callable[[], None], trainer: TrainerConfig) -> None:
    """Join the process group, run `work` and report an error to the agent."""
    _die_with_launcher()
    from lightship.distributed import comm

    try:
        comm.init_process_group(trainer.timeout_s, is_on_gpus(trainer.accelerator))
        work()
        comm.destroy_process_group()
    except BaseException as error:
        end = comm.translate_error(error)
        comm.write_error_file(end)
        if isinstance(end, Preempted | Diverged):
            comm.wait_for_rank_0()
        if isinstance(end, LightshipError) and _AGENT_PID in os.environ:
            # The agent reports it, once. All is saved; torch would wait for ranks that are gone.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.exit_code)
        if end is not error:
            raise end from error
        raise


def is_worker() -> bool:
    """Whether a launcher started this process as one of several; completes torchrun's variables."""
    given = os.environ
    if "TORCHELASTIC_RUN_ID" in given:
        return True
    if given.keys() & {"PET_NNODES", "PET_NPROC_PER_NODE"}:
        return False  # some operators also set RANK and WORLD_SIZE, counting nodes
    slurm.join_step()
    if given.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}:
        given.setdefault("LOCAL_RANK", "0")
        given.setdefault("LOCAL_WORLD_SIZE", "1")
        given.setdefault("GROUP_RANK", str(int(given["RANK"]) // int(given["LOCAL_WORLD_SIZE"])))
        return True
    return False


def _is_one_of_several_tpu_hosts() -> bool:
    """Whether GKE made this process one of several hosts; completes torchrun's variables.

    One process per host drives all of its chips (see devices/xla.py); there may be several slices.
    """
    given = os.environ
    names = given.get("TPU_WORKER_HOSTNAMES", "localhost").split(",")
    hosts = len(names) * int(given.get("MEGASCALE_NUM_SLICES", "1"))
    if hosts == 1:
        return False
    if "TPU_WORKER_ID" not in given:
        raise ConfigError(f"TPU_WORKER_HOSTNAMES names {hosts} hosts, but TPU_WORKER_ID is not set")
    host = int(given.get("MEGASCALE_SLICE_ID", "0")) * len(names) + int(given["TPU_WORKER_ID"])
    first = given.get("MEGASCALE_COORDINATOR_ADDRESS", names[0]).partition(":")[0]
    given |= {"RANK": str(host), "WORLD_SIZE": str(hosts), "GROUP_RANK": str(host)}
    given |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": first}
    given["MASTER_PORT"] = given.get("PET_MASTER_PORT", "29500")
    return True


def is_on_gpus(accelerator: str) -> bool:
    """Whether each process drives a GPU."""
    import torch

    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def _check_gpus(accelerator: str) -> None:
    """Raise ConfigError if GPUs are required and torch can use none here."""
    if accelerator not in ("gpu", "cuda"):
        return
    import torch

    is_on_mac = accelerator == "gpu" and torch.backends.mps.is_available()
    if is_on_gpus(accelerator) or is_on_mac:
        return
    reason = "none is visible"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # says why: no driver, too old, ...
        reason = str(error).partition(". ")[0]
    raise ConfigError(
        f"--trainer.accelerator {accelerator}: torch can use no GPU of this node ({reason}); give "
        "the container GPUs, update the driver, or set --trainer.accelerator cpu"
    )


def processes_here(trainer: TrainerConfig) -> int:
    """Processes on this node: --trainer.devices, else PET_NPROC_PER_NODE, else all GPUs, else 1.

    Raises:
        ConfigError: The two differ, or there are fewer GPUs.
    """
    devices, asked = trainer.devices, os.environ.get("PET_NPROC_PER_NODE", "auto")
    if devices != "auto" and asked.isdecimal() and asked != devices:
        raise ConfigError(f"--trainer.devices is {devices} but PET_NPROC_PER_NODE is {asked}")
    wanted = devices if devices != "auto" else asked
    if wanted.isdecimal() and int(wanted) == 0:
        raise ConfigError("PET_NPROC_PER_NODE is 0; it must be at least 1")
    if wanted == "1":
        return 1
    import torch

    gpus = torch.cuda.device_count() if is_on_gpus(trainer.accelerator) else 0
    if wanted == "auto":
        return gpus or 1
    if not wanted.isdecimal():
        from torch.distributed.run import determine_local_world_size

        try:
            return determine_local_world_size(wanted)
        except ValueError as error:
            raise ConfigError(f"PET_NPROC_PER_NODE is '{wanted}': {error}") from None
    if gpus and int(wanted) > gpus:
        raise ConfigError(f"--trainer.devices {wanted}: this node has {gpus} GPUs")
    return int(wanted)


def works_in_this_process(trainer: TrainerConfig, dev_path: str = "/dev") -> bool:
    """Whether `launch` will need no agent, as far as that can be told without torch (seconds).

    Args:
        trainer: Devices.
        dev_path: Folder of the device files of NVIDIA's GPUs.
    """
    if trainer.is_on_tpu:
        return True
    wanted = trainer.devices
    if wanted == "auto":
        wanted = os.environ.get("PET_NPROC_PER_NODE", "auto")
    if wanted == "auto" and trainer.accelerator in ("auto", "gpu", "cuda"):
        is_one = len(list(Path(dev_path).glob("nvidia[0-9]*"))) <= 1
    else:
        is_one = wanted in ("auto", "1")
    return is_one and os.environ.get("PET_NNODES", "1") in _ONE_NODE


def _die_with_launcher() -> None:
    """Have the kernel kill this process when its agent dies (Linux).

    An orphan would continue to train and save beside its successor.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        agent = os.environ.get(_AGENT_PID)
        if agent is not None and os.getppid() != int(agent):
            raise PeerLost("the agent of this worker has exited")
