"""A fit on the device: the CPU's results, every precision, every compile mode, no waiting."""

import math
from pathlib import Path

import pytest
import torch

from lightship.commands import fit as fit_command
from lightship.console import display
from tests.cuda import nets
from tests.cuda.conftest import DEVICE
from tests.cuda.fits import fit, results
from tests.support.step_profiler import StepProfiler

_NO_FP16 = pytest.mark.only_cuda("Lightning trains in fp16 with a scaler on GPUs only")
PRECISIONS = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}


def test_losses_are_those_of_the_cpu(tmp_path: Path) -> None:
    expected = fit(tmp_path / "cpu", "--trainer.accelerator=cpu")
    found = fit(tmp_path / "here")
    assert found == pytest.approx(expected, rel=0.05), "TF32 and the order of sums differ, no more"
    here, cpu = results(tmp_path / "here"), results(tmp_path / "cpu")
    assert here["test/acc"] == pytest.approx(cpu["test/acc"], abs=0.05)
    assert here["test/num_samples"] == cpu["test/num_samples"]


@pytest.mark.parametrize(
    "precision", [pytest.param(p, marks=_NO_FP16) if p == "16-mixed" else p for p in PRECISIONS]
)
def test_every_precision_computes_in_its_dtype_and_learns(precision: str, tmp_path: Path) -> None:
    nets._Noting.seen.clear()
    flags = ["--model.net=tests.cuda.nets:noting", f"--trainer.precision={precision}"]
    found = fit(tmp_path / "run", *flags, "--optim.name=adamw", "--optim.lr=0.01")
    assert nets._Noting.seen == {PRECISIONS[precision]}
    assert all(map(math.isfinite, found))
    assert found[-1] < found[0]


@_NO_FP16
def test_fp16_with_a_scaler_clips_unscaled_gradients(tmp_path: Path) -> None:
    """Its steps are those of float32 within fp16's digits: a scale left in would clip all."""
    flags = ["--optim.name=sgd", "--optim.lr=0.05", "--trainer.gradient_clip_val=0.5"]
    expected = fit(tmp_path / "whole", *flags)
    found = fit(tmp_path / "half", *flags, "--trainer.precision=16-mixed")
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.only_cuda("compilation takes a CPU minutes; tests/unit compiles without inductor")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_a_compiled_net_trains_the_same(mode: str, tmp_path: Path) -> None:
    """With what CUDA graphs could spoil: gradients in parts, averaged weights, evaluation."""
    flags = [
        "--model.net=tests.cuda.nets:without_chance",
        "--optim.name=adamw",
        "--model.ema_decay=0.9",
    ]
    flags.append("--trainer.accumulate_grad_batches=2")
    expected = fit(tmp_path / "eager", *flags)
    found = fit(tmp_path / "compiled", *flags, f"--model.compile={mode}")
    assert found == pytest.approx(expected, rel=0.01)
    assert results(tmp_path / "compiled")["test/loss"] == pytest.approx(
        results(tmp_path / "eager")["test/loss"], rel=0.01
    )


QUIET = {
    "adam, resident": ["--optim.name=adam"],
    "sgd, EMA, mixup, flip": [
        "--optim.name=sgd", "--model.ema_decay=0.99", "--data.mixup_alpha=0.2", "--data.flip=true",
    ],
    "muon, clipping, crop": [
        "--optim.name=muon", "--trainer.gradient_clip_val=1", "--data.crop_padding_px=2",
    ],
    "adamw, bf16, cutmix": [
        "--optim.name=adamw", "--trainer.precision=bf16-mixed", "--data.cutmix_alpha=1",
    ],
    "streamed, bf16": ["--data.mode=streaming", "--trainer.precision=bf16-mixed"],
    "fp16, scaler": ["--trainer.precision=16-mixed"],
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=_NO_FP16) if n.startswith("fp16") else n for n in QUIET]
)
def test_a_quiet_step_waits_for_nothing(name: str, tmp_path: Path, monkeypatch) -> None:
    profiler = StepProfiler(first=11, last=15)
    build = fit_command.build_trainer
    monkeypatch.setattr(
        fit_command, "build_trainer", lambda config, callbacks, *more: build(
            config, [profiler, *callbacks], *more
        ),
    )  # fmt: skip
    monkeypatch.setattr(display, "_LINE_EVERY_S", 3600.0)  # a line of progress is a log point too
    fit(tmp_path / "run", "--run.checkpoint_every_s=3600", *QUIET[name])
    if DEVICE == "cuda":
        launched = sum(n for name, n in profiler.counts.items() if "LaunchKernel" in name)
        assert launched >= 4 * 20, f"CUDA's calls are not in the profile: {profiler.counts}"
    assert profiler.counts["aten::convolution"] >= 4 * 4  # four steps of four convolutions
    assert profiler.syncs == {}, profiler.counts
