"""One process of a launcher: NCCL, and the results of a process by itself."""

import socket
from pathlib import Path

import pytest
import torch.distributed as dist
from lightning.pytorch import Callback

from lightship.commands import fit as fit_command
from tests.cuda.conftest import DEVICE
from tests.cuda.fits import fit, results


class Backends(Callback):
    """Notes which back end the gradients take, and which the control messages."""

    found: tuple[str, str] | None = None

    def on_train_start(self, trainer, pl_module) -> None:
        group = dist.group.WORLD
        device = trainer.strategy.root_device
        self.found = group._get_backend(device).name(), dist.get_backend_config(group)


def test_a_group_of_one_by_nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = fit(tmp_path / "alone", "--model.net=tests.cuda.nets:convolutions")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    given |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    backends, build = Backends(), fit_command.build_trainer
    monkeypatch.setattr(
        fit_command, "build_trainer", lambda config, callbacks, *more: build(
            config, [backends, *callbacks], *more
        ),
    )  # fmt: skip
    found = fit(tmp_path / "group", "--model.net=tests.cuda.nets:convolutions")
    assert backends.found is not None
    backend, config = backends.found
    assert backend == ("nccl" if DEVICE == "cuda" else "gloo")
    assert "cpu:gloo" in config
    assert found == pytest.approx(alone, rel=0.01)
    assert not dist.is_initialized()
    samples = "test/num_samples"
    assert results(tmp_path / "group")[samples] == results(tmp_path / "alone")[samples]
