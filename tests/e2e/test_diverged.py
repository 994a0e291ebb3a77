"""A net that gives no numbers: the run and every command on it end as they should."""

import json
import re
from pathlib import Path

import pytest

from lightship import cli
from lightship.checkpoint.store import CheckpointStore
from tests.support.runs import STEPS_PER_EPOCH, flags_of_little_run, little_images


def strict(path: Path) -> dict:
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name}: {path}"))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    return little_images(str(tmp_path_factory.mktemp("set")))


def fit(root: str, output: Path, *more: str) -> int:
    flags = flags_of_little_run(
        root, f"--run.output={output}", "--model.net=tests.support.own_nets:nan"
    )
    return cli.main([*flags, *more])


def test_the_run_goes_on_and_every_command_ends_well(root, tmp_path: Path, capsys) -> None:
    output = tmp_path / "run"
    assert fit(root, output, "--run.log_format=json", "--trainer.max_epochs=1") == 0
    printed = capsys.readouterr().err
    assert "train/loss is not finite (nan) since step 3 (never finite before)" in printed
    for line in printed.splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert strict(output / "DONE")["test/loss"] is None
    report = strict(output / "report" / "report.json")
    assert report["test/loss"] is None
    assert report["hardest"][0]["loss"] is None
    assert (output / "report" / "report.html").exists()

    assert fit(root, output, "--trainer.max_epochs=1") == 0
    assert cli.main(["test", f"--run.output={output}", "--model.trust=true"]) == 0
    assert strict(output / "report" / "test.json")["test/loss"] is None
    capsys.readouterr()
    assert cli.main(["predict", f"--run.output={output}", "--model.trust=true"]) == 78
    assert "output is not finite for any image" in capsys.readouterr().err


def test_a_run_that_early_stopping_ended_says_what_helps(root, tmp_path: Path, capsys) -> None:
    """More patience does not; another run from the last good weights does."""
    output, soon = tmp_path / "run", "--model.net=tests.support.own_nets:nan_soon"
    stopping = [soon, "--trainer.max_epochs=9", "--trainer.early_stopping_patience=2"]
    assert fit(root, output, *stopping) == 0
    assert (
        "; early stopping ends the run, and the best checkpoint always has a finite loss"
        in capsys.readouterr().err
    )
    for more in ([], ["--trainer.early_stopping_patience=5"], ["--trainer.max_epochs=12"]):
        assert fit(root, output, *stopping, *more) == 0
        said = capsys.readouterr().err
        assert "run already complete" in said
        assert "early stopping ended this run at epoch 2, where val/loss was not finite" in said
        assert "patience" not in said
    [weights] = re.findall(r"best checkpoint: (--model\.weights \S+\.ckpt)", said)
    again = [soon, "--trainer.max_epochs=1", "--optim.lr=0.001", *weights.split()]
    assert fit(root, tmp_path / "again", *again) == 0
    assert strict(tmp_path / "again" / "DONE")["test/loss"] > 0


def test_stop_ends_with_a_code_of_its_own(root, tmp_path: Path, capsys) -> None:
    assert fit(root, tmp_path / "run", "--trainer.on_nonfinite=stop") == 70
    printed = capsys.readouterr().err
    assert "training diverged: train/loss is not finite (nan) since step 3" in printed
    assert "Traceback" not in printed


def test_stop_keeps_the_best_checkpoint(root, tmp_path: Path, capsys) -> None:
    output = tmp_path / "run"
    soon = "--model.net=tests.support.own_nets:nan_soon"
    assert fit(root, output, soon, "--trainer.on_nonfinite=stop") == 70
    assert "training diverged: train/loss is not finite (nan) since step" in capsys.readouterr().err
    [best] = {commit.step for commit in [CheckpointStore(f"{output}/checkpoints").best()] if commit}
    assert best == STEPS_PER_EPOCH
    assert cli.main(["test", f"--run.output={output}", soon]) == 0
    assert strict(output / "report" / "test.json")["test/loss"] > 0
