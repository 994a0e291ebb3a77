"""A command whose memory does not suffice ends in one line that says what to change."""

from pathlib import Path

import numpy as np
import pytest

from lightship import cli
from lightship.config import Config
from lightship.training.out_of_memory import as_config_error


@pytest.mark.parametrize(
    ("net", "where", "fix"),
    [
        ("greedy", "in a training step", "--trainer.accumulate_grad_batches 4 or more"),
        ("greedy_in_evaluation", "in evaluation", "--data.eval_batch_size 128 (results do not"),
    ],
)
def test_fit_ends_with_what_to_change(
    net: str, where: str, fix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "fit", f"--run.output={tmp_path}/run", "--run.tracking=none", "--trainer.accelerator=cpu",
        f"--model.net=tests.support.own_nets:{net}", "--trainer.max_steps=2",
        "--trainer.accumulate_grad_batches=2",
    ]  # fmt: skip
    assert cli.main(flags) == 78
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"lightship: out of memory {where} (tried to allocate")
    assert f"set {fix}" in last


def test_numpy_in_reading_the_images() -> None:
    def prepare() -> None:
        np.empty(2**60, dtype=np.uint8)

    with pytest.raises(MemoryError) as raised:
        prepare()
    explained = as_config_error(raised.value, Config())
    assert str(explained).startswith(
        "out of memory for the decoded images (Unable to allocate 1.00 EiB)"
    )
    assert str(explained).endswith("set --data.mode streaming")


CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.81 GiB of "
    "which 3.12 GiB is free. Including non-PyTorch memory, this process has 136.68 GiB in use."
)


def test_sizes_of_a_gpu_are_kept() -> None:
    text = str(as_config_error(RuntimeError(CUDA), Config()))
    assert "(Tried to allocate 20.00 GiB; GPU 0 has a total capacity of 139.81 GiB of which" in text
    assert "--data.eval_batch_size 128" in text
    assert "--trainer.accumulate_grad_batches 2" in text


def test_other_errors_are_not_of_memory() -> None:
    assert (
        as_config_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), Config()) is None
    )
