"""An exported program, moved to the device as the documentation says, gives the CPU's outputs."""

from pathlib import Path

import pytest
import torch
from torch.export.passes import move_to_device_pass

from lightship import cli
from tests.cuda.fits import command, fit


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exported") / "run"
    fit(output, "--model.test_flip=true", "--model.test_shift=true", "--optim.lr=0.003")
    return output


def test_a_program_moved_to_the_device(run: Path, device: torch.device) -> None:
    assert cli.main(["export", f"--run.output={run}"]) == 0
    program = torch.export.load(run / "export" / "model.pt2")
    images = torch.randint(0, 256, (33, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = program.module()(images)
        moved = move_to_device_pass(program, str(device)).module()
        for count in (1, 33):  # any number of images
            found = moved(images[:count].to(device))
            assert all(output.device == device for output in found)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours.cpu(), theirs[:count], rtol=2e-3, atol=2e-4)


def test_checkpoint_of_the_device_is_tested_on_the_cpu(run: Path, tmp_path: Path) -> None:
    assert cli.main(command("test", run, "--trainer.accelerator=cpu")) == 0
