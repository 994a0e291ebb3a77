"""A home that cannot be written, and a data root that the run's own output lies in."""

import json
from pathlib import Path

import pytest

from lightship import cli
from tests.support.forked import lightship
from tests.support.runs import flags_of_little_run, little_images


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a uid without a passwd entry: W&B, which logs images too, gets other folders."""
    root, output = little_images(str(tmp_path / "set")), tmp_path / "run"
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    flags = flags_of_little_run(root, f"--run.output={output}", "--run.tracking=offline")
    with lightship(flags, tmp_path, env={"HOME": "/proc/nobody"}) as child:
        assert child.wait() == 0, child.output
    assert not [line for line in child.output.splitlines() if "warning: " in line], child.output
    assert (output / "DONE").exists()
    assert list((output / "logs").rglob("*.wandb")), child.output


def test_the_output_lies_in_the_data_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`cd images; lightship fit --data.root .`, twice: the first run's folder is no class."""
    monkeypatch.chdir(little_images(str(tmp_path / "images")))
    for lr in ("0.01", "0.02"):
        flags = [flag for flag in flags_of_little_run(".") if not flag.startswith("--optim.lr")]
        assert cli.main([*flags, "--trainer.max_epochs=1", f"--optim.lr={lr}"]) == 0
        assert "in 3 classes" in capsys.readouterr().err
    runs = sorted(Path("runs").iterdir())
    assert len(runs) == 2
    assert all(json.loads((run / "DONE").read_bytes()) for run in runs)
