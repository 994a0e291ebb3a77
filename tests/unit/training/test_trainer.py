"""A Trainer that cannot be built: one line that names the flags, and no other flags."""

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightship import cli, devices
from lightship.commands.base import Command
from lightship.distributed import comm
from lightship.errors import ConfigError
from lightship.training.trainer import build_trainer, start_progress


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--trainer.accelerator=tpu", "--model.compile=default"], r"^--model\.compile default: "),
        (["--trainer.accelerator=no-such"], r"--trainer\.accelerator no-such, --trainer\.devices"),
    ],
)
def test_what_cannot_be_trained_on(flags: list[str], line: str) -> None:
    command = cli.parse(["fit", "--config=digits", *flags])
    assert isinstance(command, Command)
    with pytest.raises(ConfigError, match=line):
        build_trainer(command.config, [])


@pytest.mark.parametrize("trains", [True, False])
def test_synchronized_batch_norm_on_cpus(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused for a fit, even beside GPUs; no matter to a run's evaluation."""
    flags = ["--trainer.sync_batchnorm=true", "--trainer.accelerator=cpu"]
    command = cli.parse(["fit", "--config=digits", *flags])
    assert isinstance(command, Command)
    monkeypatch.setattr(comm, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"):
        monkeypatch.setenv(name, "0")
    if trains:
        with pytest.raises(ConfigError, match=r"^--trainer\.sync_batchnorm true needs GPUs"):
            build_trainer(command.config, [], checkpoint_io=TorchCheckpointIO())
    else:
        assert build_trainer(command.config, []).world_size == 2


def test_a_precision_that_a_cpu_does_not_have_is_named(caplog: pytest.LogCaptureFixture) -> None:
    flags = ["--trainer.precision=16-mixed", "--trainer.accelerator=cpu"]
    command = cli.parse(["fit", "--config=digits", *flags])
    assert isinstance(command, Command)
    start_progress(command.config)
    assert caplog.messages == ["--trainer.precision 16-mixed: Lightning uses bf16-mixed on a CPU"]
    assert build_trainer(command.config, []).precision == "bf16-mixed"


def test_precision_auto_is_what_the_cpu_computes_in() -> None:
    flags = ["--trainer.precision=auto", "--trainer.accelerator=cpu"]
    command = cli.parse(["fit", "--config=digits", *flags])
    assert isinstance(command, Command)
    is_fast = devices.has_bf16_units(torch.device("cpu"))
    assert build_trainer(command.config, []).precision == ("bf16-mixed" if is_fast else "32-true")
