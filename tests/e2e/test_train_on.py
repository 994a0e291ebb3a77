"""A finished run that is asked for more trains on; one asked for no more, or for less, says so."""

import json
from pathlib import Path

import pytest

from lightship import cli
from lightship.commands import dispatch
from lightship.commands import fit as run
from lightship.config import Config
from lightship.run.folder import RunFolder
from tests.support.runs import little_images

FIT = [
    "fit", "--data.root=images", "--run.output=run", "--run.tracking=none", "--run.log_images=0",
    "--model.net=tests.support.own_nets:pooled_linear", "--data.global_batch_size=6",
    "--optim.schedule=cosine", "--optim.lr=0.01",
]  # fmt: skip
STEPS = 4
"""An epoch's."""


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "write_report", lambda *_: None)
    little_images("images")


def fit(capsys, *flags: str) -> str:
    """What a fit that ends with 0 says."""
    assert cli.main([*FIT, *flags]) == 0
    return capsys.readouterr().err


def steps() -> int:
    return int(json.loads(Path("run/DONE").read_text())["steps"])


def test_more_epochs(capsys) -> None:
    fit(capsys, "--trainer.max_epochs=2")
    assert steps() == 2 * STEPS
    said = fit(capsys, "--trainer.max_epochs=2")
    assert "run already complete" in said

    said = fit(capsys, "--trainer.max_epochs=3")
    assert "complete at step 8, epoch 2; training on: --trainer.max_epochs 3" in said
    assert "spans 12 steps: the rate at step 8 changes from 0 to 0.00173" in said
    assert steps() == 3 * STEPS

    said = fit(capsys, "--trainer.max_epochs=1")
    assert "--trainer.max_epochs 1 is below the 3 epochs done" in said
    assert "run already complete" in said
    Path("run/DONE").unlink()
    assert cli.main([*FIT, "--trainer.max_epochs=1"]) == 78
    assert "--trainer.max_epochs is 1; the checkpoint is at 3 epochs: set 3 or more" in (
        capsys.readouterr().err
    )


def test_more_steps(capsys) -> None:
    fit(capsys, "--trainer.max_steps=3", "--trainer.max_epochs=-1")
    assert "run already complete" in fit(capsys, "--trainer.max_steps=3", "--trainer.max_epochs=9")
    said = fit(capsys, "--trainer.max_steps=6", "--trainer.max_epochs=-1")
    assert "spans 6 steps: the rate at step 3 changes from 0 to 0.00345" in said
    assert steps() == 6
    said = fit(capsys, "--trainer.max_steps=5", "--trainer.max_epochs=9")
    assert "--trainer.max_steps 5 is below the 6 steps done" in said
    Path("run/DONE").unlink()
    assert cli.main([*FIT, "--trainer.max_steps=5"]) == 78
    assert "--trainer.max_steps is 5" in capsys.readouterr().err


def test_a_run_that_early_stopping_ended(capsys) -> None:
    """With a rate of nothing no validation is better than the first."""
    still = ["--optim.lr=1e-12", "--optim.name=sgd"]
    first = [*still, "--trainer.max_epochs=6", "--trainer.early_stopping_patience=1"]
    fit(capsys, *first)
    assert steps() == 2 * STEPS
    assert "run already complete" in fit(capsys, *first)
    said = fit(capsys, *first, "--trainer.max_epochs=8")
    assert "early stopping ended this run at epoch 2" in said
    assert "--trainer.early_stopping_patience (was 1)" in said
    assert steps() == 2 * STEPS

    fit(capsys, *first, "--trainer.early_stopping_patience=3")
    assert steps() == 4 * STEPS
    fit(capsys, *first, "--trainer.early_stopping_patience=0")
    assert steps() == 6 * STEPS


def test_a_damaged_DONE_ends_the_run_anew(capsys) -> None:
    fit(capsys, "--trainer.max_epochs=1")
    for damage in (b"", b"\xff\xfe", b"[1]", b'{"test/acc": "high"}', b"[" * 20_000):
        Path("run/DONE").write_bytes(damage)
        said = fit(capsys, "--trainer.max_epochs=1")
        assert "run/DONE is damaged: moved to DONE.damaged" in said
        assert steps() == STEPS


@pytest.mark.parametrize("max_epochs", [1, 2])
def test_only_a_run_that_is_to_train_needs_its_processes(capsys, max_epochs: int) -> None:
    fit(capsys, "--trainer.max_epochs=1")
    command = cli.parse([*FIT, f"--trainer.max_epochs={max_epochs}"])
    assert (dispatch._completed(command) is not None) == (max_epochs == 1)


DAMAGES = {
    "logs/metrics.csv": [b"", b"\xff\xfe\x00", b"step;epoch;time_s\n1;0;2\n", b'"\n' * 9],
    "logs/starts.json": [b"", b"{}", b"[3]", b'[{"began": "yesterday"}]', b"[" * 20_000],
    "logs/tracking_id": [b"", b"\xff\xfe", b"no/such/id", b"x" * 999],
}


def test_damaged_files_that_are_not_needed_are_moved_aside(capsys) -> None:
    fit(capsys, "--trainer.max_epochs=1")
    for name, damages in DAMAGES.items():
        for number, damage in enumerate(damages):
            Path("run", name).write_bytes(damage)
            Path("run/DONE").unlink()
            said = fit(capsys, "--trainer.max_epochs=1")
            if (name, number) != ("logs/metrics.csv", 0):  # an empty table has no rows
                assert said.count(f"run/{name} is ") == 1, (name, damage)
                assert Path("run", f"{name}.damaged").read_bytes() == damage
            assert steps() == STEPS


def test_a_run_without_its_config_is_named(capsys) -> None:
    fit(capsys, "--trainer.max_epochs=1")
    Path("run/config.yaml").unlink()
    assert cli.main([*FIT, "--trainer.max_epochs=1"]) == 78
    assert "without config.yaml" in capsys.readouterr().err
    Path("run/DONE").unlink()
    assert cli.main([*FIT, "--trainer.max_epochs=1"]) == 78
    assert "without config.yaml" in capsys.readouterr().err


def test_what_a_finished_run_without_checkpoints_says(capsys) -> None:
    fit(capsys, "--trainer.max_epochs=1")
    for file in Path("run/checkpoints").iterdir():
        file.unlink()
    settings: Config = cli.parse([*FIT, "--trainer.max_epochs=5"]).config
    assert RunFolder(settings).completed()
