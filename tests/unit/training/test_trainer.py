"""A Trainer that cannot be built: one line that names the flags, and no other flags."""

import pytest
import torch

from lightship import cli, devices
from lightship.commands.base import Command
from lightship.errors import ConfigError
from lightship.training.trainer import build_trainer


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


def test_precision_auto_is_what_the_cpu_computes_in() -> None:
    flags = ["--trainer.precision=auto", "--trainer.accelerator=cpu"]
    command = cli.parse(["fit", "--config=digits", *flags])
    assert isinstance(command, Command)
    is_fast = devices.has_bf16_units(torch.device("cpu"))
    assert build_trainer(command.config, []).precision == ("bf16-mixed" if is_fast else "32-true")
