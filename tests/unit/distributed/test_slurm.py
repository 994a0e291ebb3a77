"""SLURM's variables: with srun one of several tasks, without it a process alone."""

import os
import re

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from lightship import cli
from lightship.commands.base import Command
from lightship.distributed import comm, slurm
from lightship.errors import ConfigError
from lightship.training.trainer import build_trainer

JOB = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train",
       "SLURM_NODELIST": "n[3-4]"}  # fmt: skip
TASK = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
SCRIPT = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "ENVIRONMENT": "BATCH"}
TORCHRUNS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in {*os.environ, *TORCHRUNS, "SLURM_NTASKS_PER_NODE"}:
        if name.startswith("SLURM_") or name in (*TORCHRUNS, "ENVIRONMENT"):
            monkeypatch.setenv(name, "")  # so that it is put back
            monkeypatch.delenv(name)


def given(monkeypatch, *parts: dict[str, str]) -> None:
    for name, value in {key: value for part in parts for key, value in part.items()}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("step", [{"SLURM_STEP_NUM_TASKS": "4", "ENVIRONMENT": "BATCH"}, {}])
def test_a_task_of_srun_is_a_rank(monkeypatch, step):
    given(monkeypatch, JOB, TASK, step)
    slurm.join_step()
    ranks = {name: os.environ[name] for name in TORCHRUNS[:5]}
    assert ranks == dict(zip(TORCHRUNS, ("3", "4", "1", "2", "n3"), strict=False))
    assert os.environ["MASTER_PORT"].isdecimal()


def test_a_step_on_a_part_of_the_jobs_nodes(monkeypatch):
    given(monkeypatch, JOB, TASK, {"SLURM_NTASKS": "3", "SLURM_STEP_NUM_NODES": "1"})
    slurm.join_step()
    assert os.environ["LOCAL_WORLD_SIZE"] == "3"


@pytest.mark.parametrize(
    ("uneven", "said"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "3,1"}, r"different numbers of tasks \(3,1\)"),
        ({"SLURM_NTASKS": "3"}, r"different numbers of tasks \(3 on 2 nodes\)"),
    ],
)
def test_nodes_with_different_numbers_of_tasks(monkeypatch, uneven, said):
    given(monkeypatch, JOB, TASK, uneven)
    with pytest.raises(ConfigError, match=f"{said}: set srun --ntasks-per-node"):
        slurm.join_step()


def test_a_task_that_sees_its_own_gpu_only(monkeypatch):
    """srun --gpus-per-task=1: each process would need another number than its local rank."""
    given(monkeypatch, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    said = r"number 4 of its node and sees 1 GPU: .*--gpus-per-node.*, not .*--gpus-per-task"
    with pytest.raises(ConfigError, match=said):
        comm.init_process_group(5, on_cuda=True)


@pytest.mark.parametrize(
    "alone",
    [
        {},  # the shell of salloc
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash in a job of 4
        SCRIPT,
    ],
)
def test_without_srun_a_process_is_alone_and_says_so(monkeypatch, caplog, alone):
    given(monkeypatch, JOB, alone)
    slurm.join_step()
    assert re.search(r"4 tasks.*without srun", caplog.text)
    assert "RANK" not in os.environ
    command = cli.parse(["fit", "--config=digits", "--trainer.accelerator=cpu"])
    assert isinstance(command, Command)
    trainer = build_trainer(command.config, [])
    assert trainer.world_size == 1
    assert isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "SLURM_NNODES", "SLURM_PROCID", "SLURM_JOB_ID"])
def test_a_variable_that_is_no_number_is_named(monkeypatch, name):
    given(monkeypatch, JOB, TASK, {name: "abc"})
    with pytest.raises(ConfigError, match=r"SLURM_.*abc"):
        slurm.join_step()
