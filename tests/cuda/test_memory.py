"""Memory of the device: what doctor foresees, and what is said when it does not suffice."""

from pathlib import Path

import pytest
import torch

from lightship import cli
from lightship.doctor import dry_run
from lightship.doctor.memory import Room, estimate
from tests.cuda.conftest import DEVICE
from tests.cuda.fits import command
from tests.support.images import little_set, put

GIB = 2**30


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> str:
    files = little_set(("train", "val"), per_class=86, size_px=(128, 128), image_format="jpg")
    return put(str(tmp_path_factory.mktemp("images")), files)


def flags(root: str, batch_size: int) -> list[str]:
    return [
        f"--data.root={root}", "--model.net=resnet50", f"--data.global_batch_size={batch_size}",
        "--data.eval_batch_size=64", "--model.channels_last=true", "--trainer.precision=bf16-mixed",
        "--optim.name=sgd", "--trainer.max_epochs=-1", "--trainer.max_steps=3",
    ]  # fmt: skip


@pytest.mark.only_cuda("a CPU's allocator has no limit to set")
def test_out_of_memory_ends_in_one_line_that_says_what_to_change(
    photographs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2 * GIB / total)
    try:
        code = cli.main(command("fit", tmp_path / "run", *flags(photographs, 256)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 78, last
    assert last.startswith("lightship: out of memory in a training step (Tried to allocate"), last
    assert "--trainer.accumulate_grad_batches 2 or more" in last


@pytest.mark.only_cuda("peak memory of tensors is not counted on a CPU")
def test_peak_memory_is_what_doctor_foresees(photographs: str, tmp_path: Path) -> None:
    arguments = command("fit", tmp_path / "run", *flags(photographs, 256))
    parsed = cli.parse(["doctor", *arguments[1:]])
    device = torch.device("cuda", 0)
    cost = dry_run.measure(parsed.config, 128, 3, device)
    room = Room(1, 1, None, torch.cuda.get_device_properties(0).total_memory)
    data_bytes = 3 * 128**2 * 3 * 86
    finding = estimate(parsed.config, cost, room, data_bytes)
    foreseen = float(finding.found.split("about ")[1].split(" ")[0]) - 0.8  # CUDA's context
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert cli.main(arguments) == 0
    peak = torch.cuda.max_memory_allocated() / GIB
    print(f"peak {peak:.2f} GiB, doctor {foreseen:.2f} GiB without the context: {finding.found}")
    assert 0.8 * peak <= foreseen <= 1.5 * peak


def test_a_batch_that_does_not_fit_fails_doctors_row(photographs: str, tmp_path: Path) -> None:
    parsed = cli.parse(["doctor", *command("fit", tmp_path / "run", *flags(photographs, 64))[1:]])
    cost = dry_run.measure(parsed.config, 32, 3, torch.device(DEVICE))
    finding = estimate(parsed.config, cost, Room(1, 1, None, GIB // 2), 0)
    assert finding.status == "fail"
    assert "of 0.5 GiB per GPU" in finding.found
