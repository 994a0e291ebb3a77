"""Between log points a training step of the whole job never waits for the device."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from lightship import cli
from lightship.commands import fit
from lightship.console import display

SYNCS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero"}


class StepProfiler(Callback):
    """Profiles the steps from `first` up to `last`, all hooks of all callbacks included."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.counts: dict[str, int] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.first:
            self.profile.start()
        elif trainer.global_step == self.last and not self.counts:
            self.profile.stop()
            for event in self.profile.events():
                if not _in_fused_adam(event):
                    self.counts[event.name] = self.counts.get(event.name, 0) + 1


def _in_fused_adam(event) -> bool:
    """Adam's CPU kernel reads its step count, a CPU tensor; on a GPU the count stays there."""
    while event is not None:
        if event.name.startswith("aten::_fused_adam"):
            return True
        event = event.cpu_parent
    return False


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
    assert {name: n for name, n in profiler.counts.items() if name in SYNCS} == {}
