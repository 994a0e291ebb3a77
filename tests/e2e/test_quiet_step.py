"""Between log points a training step of the whole job never waits for the device."""

from pathlib import Path

import pytest

from lightship import cli
from lightship.commands import fit
from lightship.console import display
from tests.support.step_profiler import StepProfiler


@pytest.mark.parametrize(
    "flags",
    [
        ["--optim.name=adam"],
        [
            "--optim.name=sgd",
            "--model.ema_decay=0.99",
            "--data.mixup_alpha=0.2",
            "--data.flip=true",
        ],
        ["--optim.name=muon", "--trainer.gradient_clip_val=1", "--data.crop_padding_px=2"],
        ["--optim.name=adamw", "--trainer.precision=bf16-mixed", "--data.cutmix_alpha=1"],
    ],
    ids=["adam", "sgd-ema-mixup", "muon-clip-crop", "adamw-bf16-cutmix"],
)
def test_no_sync_between_log_points(tmp_path: Path, monkeypatch, flags: list[str]) -> None:
    profiler = StepProfiler(first=11, last=19)
    build = fit.build_trainer

    def with_profiler(config, callbacks, *args):
        return build(config, [profiler, *callbacks], *args)

    monkeypatch.setattr(fit, "build_trainer", with_profiler)
    # A line of progress every few seconds is a log point too; here it must not be one of chance.
    monkeypatch.setattr(display, "_LINE_EVERY_S", 3600.0)
    arguments = [
        "fit", "--config=digits", f"--run.output={tmp_path}/run", "--trainer.max_steps=25",
        "--trainer.log_every_n_steps=10", "--run.checkpoint_every_s=3600", *flags,
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    assert profiler.counts["aten::convolution"] >= 8 * 4  # eight steps of four convolutions
    assert profiler.syncs == {}
