"""Processes that SLURM's srun has started, and jobs in which it has not."""

import logging
import os

from lightship.errors import ConfigError

logger = logging.getLogger(__name__)


def join_step() -> None:
    """Complete torchrun's variables if srun started this process as one of several tasks.

    An allocation alone (in an sbatch script without srun, in the shell of salloc) sets SLURM's
    variables too, but starts one process: a warning says so.

    Raises:
        ConfigError: A variable is invalid, or nodes have different numbers of tasks.
    """
    tasks = _number("SLURM_NTASKS", 1)
    if tasks <= 1:
        return
    if not _is_task_of_several():
        logger.warning(
            f"the SLURM job has {tasks} tasks, but this process was started without srun and uses "
            "this node only; use srun to start all tasks"
        )
        return
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    nodes = _number("SLURM_STEP_NUM_NODES", _number("SLURM_NNODES", 1))
    here = _tasks_per_node(tasks, max(1, nodes))
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(here))  # Lightning insists on it
    try:
        slurm = SLURMEnvironment(auto_requeue=False)
        os.environ |= {
            "RANK": str(_number("SLURM_PROCID", 0)),
            "WORLD_SIZE": str(tasks),
            "LOCAL_RANK": str(_number("SLURM_LOCALID", 0)),
            "LOCAL_WORLD_SIZE": str(here),
            "MASTER_ADDR": slurm.main_address,
            "MASTER_PORT": str(slurm.main_port),
        }
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"a SLURM_* variable is wrong: {error}") from None


def _tasks_per_node(tasks: int, nodes: int) -> int:
    """Tasks on each node. Raises ConfigError if they differ, as Lightning's DDP cannot have it."""
    listed = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # 8(x2), or 8,4
    if "," in listed or tasks % nodes:
        raise ConfigError(
            f"the nodes have different numbers of tasks ({listed or f'{tasks} on {nodes} nodes'}): "
            "set srun --ntasks-per-node to the number of GPUs of a node"
        )
    return tasks // nodes


def _is_task_of_several() -> bool:
    if "SLURM_PROCID" not in os.environ:
        return False  # the shell of salloc
    if "SLURM_STEP_NUM_TASKS" in os.environ:  # of the step that this process belongs to
        return _number("SLURM_STEP_NUM_TASKS", 1) > 1
    is_script = os.environ.get("ENVIRONMENT") == "BATCH"
    return not is_script and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ConfigError(f"{name} is '{value}'; it must be a number")
    return int(value)
