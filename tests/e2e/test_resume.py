"""Going on from any checkpoint gives, bit for bit, the run that was never stopped (CPU)."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightship import cli, storage
from lightship.checkpoint.record import Commit
from lightship.checkpoint.store import CheckpointStore
from lightship.commands import fit as run
from lightship.data.batch import Batch
from lightship.models.classifier import ImageClassifier
from lightship.training.callbacks.checkpointing import Checkpointing
from lightship.training.callbacks.seeding import StepSeeding
from tests.support.images import little_set, put
from tests.support.runs import differences, flags_of_little_run, last_state, little_images

EVERY_STEP = ["--run.checkpoint_every_steps=1"]


def fit(root: str, output: str, *flags: str) -> int:
    return cli.main(flags_of_little_run(root, f"--run.output={output}", *flags))


def store_of(output: str) -> CheckpointStore:
    return CheckpointStore(f"{output}/checkpoints")


def copy_of_run(output: str, commits: list[Commit], to: str) -> str:
    """A run as a kill just after the last of `commits` leaves it."""
    names = [
        name for commit in commits for name in (commit.file, commit.file[:-5] + ".commit.json")
    ]
    for name in ["config.yaml", "checkpoints/attempt", *(f"checkpoints/{name}" for name in names)]:
        storage.write_bytes(f"{to}/{name}", storage.read_bytes(f"{output}/{name}"))
    return to


@pytest.fixture(autouse=True, scope="module")
def no_pictures() -> Iterator[None]:
    """Drawing the report is most of so short a run's time, and its numbers stand in DONE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_report", lambda *_: None)
        yield


@pytest.fixture
def keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint is ever deleted."""
    monkeypatch.setattr(CheckpointStore, "remove_checkpoint", lambda *_: None)


CASES = {
    "plain": (0, []),
    "accumulation": (2, ["--trainer.accumulate_grad_batches=3"]),
    "ema, cutmix": (2, ["--model.ema_decay=0.9", "--data.cutmix_alpha=1"]),
    "validation every 2": (1, ["--trainer.check_val_every_n_epoch=2"]),
    "max_steps in an epoch": (0, ["--trainer.max_steps=10"]),
    "max_steps at an epoch's end": (2, ["--trainer.max_steps=8", "--trainer.max_epochs=-1"]),
    "no validation": (1, ["--data.val_fraction=0"]),
    "speednet": (
        1,
        [
            "--model.net=speednet",
            "--data.image_size_px=12",
            "--optim.name=muon-sgd",
            "--optim.lr=0.1",
            "--optim.whitening_fraction=0.5",
            "--data.flip_in_turn=true",
            "--optim.schedule=linear",
        ],
    ),
    "early stopping": (0, ["--trainer.early_stopping_patience=1", "--trainer.max_epochs=9"]),
    "part of an epoch": (2, ["--trainer.limit_train_batches=3"]),
}


@pytest.mark.usefixtures("keep_all")
@pytest.mark.parametrize("case", CASES)
def test_every_save_point(case: str, tmp_path: Path) -> None:
    """Of the first epochs every save is tried (or every third, where the mechanism is the same)."""
    torch.set_num_threads(1)
    thin, flags = CASES[case]
    root = little_images(str(tmp_path / "images"), val=case != "no validation")
    whole, often = f"{tmp_path}/whole", f"{tmp_path}/often"
    assert fit(root, whole, *flags) == 0
    expected = last_state(whole)
    assert fit(root, often, *flags, *EVERY_STEP) == 0
    assert differences(expected, last_state(often)) == [], "saving changes nothing"

    commits = store_of(often).commits()
    steps = expected["global_step"]
    assert {commit.step for commit in commits} == set(range(1, steps + 1))
    if case == "early stopping":
        assert steps < 36, "it stopped early"
    for index, commit in enumerate(commits):
        last_ones = index >= len(commits) - 2
        if index % (thin + 1) and not last_ones:
            continue
        again = copy_of_run(often, commits[: index + 1], f"{tmp_path}/{index}")
        assert fit(root, again, *flags) == 0
        assert differences(expected, last_state(again)) == [], f"from {commit}"


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """Step -> the images that it was trained on, in order."""
    steps: dict[int, list[int]] = {}
    training_step = ImageClassifier.training_step

    def recorded(self: ImageClassifier, batch: Batch, batch_idx: int) -> torch.Tensor:
        steps.setdefault(self.trainer.global_step, []).extend(batch.ids.tolist())
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, "training_step", recorded)
    return steps


@pytest.mark.usefixtures("keep_all")
@pytest.mark.parametrize("is_stored", [True, False], ids=["stored", "older version"])
@pytest.mark.parametrize(("before", "now"), [(1, 2), (1, 3), (3, 1)])
def test_other_parts_of_a_batch_neither_skip_nor_repeat_images(
    trained_on, before: int, now: int, is_stored: bool, tmp_path: Path, monkeypatch
) -> None:
    if not is_stored:
        save = Checkpointing.on_save_checkpoint

        def save_as_before(self: Checkpointing, trainer, module, checkpoint: dict) -> None:
            save(self, trainer, module, checkpoint)
            checkpoint["lightship"].pop("accumulate_grad_batches", None)

        monkeypatch.setattr(Checkpointing, "on_save_checkpoint", save_as_before)
    root, often = little_images(str(tmp_path / "images")), f"{tmp_path}/often"
    flags = ["--trainer.max_epochs=2"]
    parts = f"--trainer.accumulate_grad_batches={before}"
    assert fit(root, often, *flags, *EVERY_STEP, parts) == 0
    expected = dict(trained_on)
    assert sorted(expected) == list(range(8))
    commits = store_of(often).commits()
    for index, commit in enumerate(commits[: None if is_stored else 3]):
        again = copy_of_run(often, commits[: index + 1], f"{tmp_path}/{index}")
        trained_on.clear()
        assert fit(root, again, *flags, f"--trainer.accumulate_grad_batches={now}") == 0
        left = {step: ids for step, ids in expected.items() if step >= commit.step}
        assert trained_on == left, f"from {commit}"


@pytest.mark.usefixtures("keep_all")
def test_a_save_before_a_validation_and_one_after_it_are_both_there(tmp_path: Path) -> None:
    root = little_images(str(tmp_path / "images"))
    assert fit(root, f"{tmp_path}/run", *EVERY_STEP) == 0
    ends = [c for c in store_of(f"{tmp_path}/run").commits() if c.step % 4 == 0]
    assert [c.step for c in ends] == [4, 4, 8, 8, 12, 12]
    assert [c.epoch for c in ends] == [0, 1, 1, 2, 2, 3]
    assert [c.score is None for c in ends] == [True, False] * 3


def test_a_run_killed_between_training_and_done_finishes(tmp_path: Path) -> None:
    root, output = little_images(str(tmp_path / "images")), f"{tmp_path}/run"
    assert fit(root, output, "--model.ema_decay=0.9") == 0
    expected = last_state(output)
    for name in ("DONE", "logs/metrics.csv"):
        (tmp_path / "run" / name).unlink()
    before = [commit.file for commit in store_of(output).commits()]
    assert fit(root, output, "--model.ema_decay=0.9") == 0
    assert differences(expected, last_state(output)) == []
    assert [commit.file for commit in store_of(output).commits()] == before, "nothing was trained"


def test_a_log_window_open_at_a_save_is_closed_with_all_its_steps(tmp_path: Path) -> None:
    """Steps 1 and 2 are in the checkpoint, 3 comes after it: the row of step 3 averages all."""
    root = little_images(str(tmp_path / "images"))
    flags = ["--trainer.max_steps=3", "--trainer.log_every_n_steps=3"]
    assert fit(root, f"{tmp_path}/whole", *flags) == 0
    assert fit(root, f"{tmp_path}/often", *flags, *EVERY_STEP, "--run.keep_last=9") == 0
    commits = store_of(f"{tmp_path}/often").commits()
    again = copy_of_run(f"{tmp_path}/often", commits[:2], f"{tmp_path}/again")
    assert fit(root, again, *flags) == 0

    def losses(output: str) -> list[str]:
        with Path(output, "logs", "metrics.csv").open() as file:
            return [row["train/loss"] for row in csv.DictReader(file)]

    assert losses(again) == losses(f"{tmp_path}/whole")
    assert len(losses(again)) == 1


def test_the_normalization_stays_when_images_are_damaged_between_two_starts(
    tmp_path: Path, capsys
) -> None:
    """They are of the images that mean and deviation were computed of: all are."""
    root, output = little_images(str(tmp_path / "images")), f"{tmp_path}/run"
    flags = ["--data.mode=streaming", "--data.on_error=skip", "--data.max_bad_fraction=0.2"]
    assert fit(root, output, *flags, "--trainer.max_steps=3") == 0
    before = last_state(output)["hyper_parameters"]
    (tmp_path / "images" / "train" / "bee" / "003.png").write_bytes(b"garbage")
    capsys.readouterr()
    assert fit(root, output, *flags, "--trainer.max_epochs=2") == 0
    assert ", from step 3;" in capsys.readouterr().err
    after = last_state(output)
    assert after["global_step"] == 8
    assert after["hyper_parameters"] == before


def test_seeding_is_the_same_on_every_python(tmp_path: Path) -> None:
    """The numbers a step draws are part of what a resumed run repeats, also after an upgrade."""

    class Here:
        global_rank, current_epoch, device = 1, 2, torch.device("cpu")

    StepSeeding(7).on_train_batch_start(Here(), Here(), None, 3)  # type: ignore[arg-type]
    assert torch.initial_seed() == 17538072120566645883


class TestStartingFromAnotherRunsCheckpoint:
    """`fit --ckpt_path`: start from it; once the run has checkpoints of its own, from those."""

    @pytest.fixture(scope="class")
    def runs(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, dict, str]:
        path = tmp_path_factory.mktemp("ckpt_path")
        root, whole = little_images(str(path / "images")), str(path / "whole")
        assert fit(root, whole, "--run.keep_last=100", *EVERY_STEP) == 0
        third = next(c for c in store_of(whole).commits() if c.step == 3)
        return root, whole, last_state(whole), store_of(whole).url_of(third)

    def test_a_url(self, runs, tmp_path: Path, capsys) -> None:
        root, _, expected, url = runs
        output = f"{tmp_path}/run"
        assert fit(root, output, f"--ckpt_path={url}") == 0
        assert "from step 3" in capsys.readouterr().err
        assert differences(expected, last_state(output)) == []
        (tmp_path / "run" / "DONE").unlink()
        assert fit(root, output, f"--ckpt_path={url}") == 0
        assert "from step 12" in capsys.readouterr().err, "a restart goes on, not back"

    def test_a_file_without_its_record(self, runs, tmp_path: Path) -> None:
        root, _, expected, url = runs
        alone = f"{tmp_path}/alone.ckpt"
        storage.write_bytes(alone, storage.read_bytes(url))
        assert fit(root, f"{tmp_path}/run", f"--ckpt_path={alone}") == 0
        assert differences(expected, last_state(f"{tmp_path}/run")) == []

    def test_best_goes_back_and_what_follows_counts_as_newer(self, runs, tmp_path: Path) -> None:
        root, whole, _, _ = runs
        commits = store_of(whole).commits()
        best = store_of(whole).best()
        assert best is not None
        assert best.step < 12
        output = copy_of_run(whole, commits, f"{tmp_path}/run")
        assert fit(root, output, "--ckpt_path=best", f"--trainer.max_steps={best.step + 1}") == 0
        newest = store_of(output).newest()
        assert newest is not None
        assert newest.step == best.step + 1

    @pytest.mark.parametrize("name", ["best", "last"])
    def test_a_name_where_there_is_none(self, runs, name, tmp_path: Path, capsys) -> None:
        assert fit(runs[0], f"{tmp_path}/run", f"--ckpt_path={name}") == 78
        assert f"--ckpt_path {name}: no valid checkpoint under" in capsys.readouterr().err

    def test_what_is_not_there(self, runs, tmp_path: Path, capsys) -> None:
        assert fit(runs[0], f"{tmp_path}/run", f"--ckpt_path={tmp_path}/no.ckpt") == 78
        assert f"{tmp_path}/no.ckpt" in capsys.readouterr().err

    def test_weights_alone(self, runs, tmp_path: Path, capsys) -> None:
        torch.save({"state_dict": {}}, tmp_path / "weights.ckpt")
        assert fit(runs[0], f"{tmp_path}/run", f"--ckpt_path={tmp_path}/weights.ckpt") == 78
        assert "--model.weights" in capsys.readouterr().err

    def test_another_model(self, runs, tmp_path: Path, capsys) -> None:
        flags = [f"--ckpt_path={runs[3]}", "--optim.lr=0.5", "--model.label_smoothing=0.1"]
        assert fit(runs[0], f"{tmp_path}/run", *flags) == 78
        told = capsys.readouterr().err
        assert "label_smoothing was 0.0, is 0.1" in told
        assert "Traceback" not in told


class TestWhenThereIsARun:
    @pytest.fixture
    def finished(self, tmp_path: Path) -> tuple[str, str]:
        root = put(str(tmp_path / "images"), little_set(("train", "test"), per_class=8))
        assert fit(root, f"{tmp_path}/run", "--trainer.max_epochs=2") == 0
        return root, f"{tmp_path}/run"

    def test_done_ends_it(self, finished, capsys) -> None:
        root, output = finished
        before = {p: p.stat().st_mtime_ns for p in Path(output).rglob("*")}
        assert fit(root, output, "--trainer.max_epochs=2") == 0
        assert "run already complete" in capsys.readouterr().err
        assert before == {p: p.stat().st_mtime_ns for p in Path(output).rglob("*")}

    def test_done_does_not_hide_that_another_run_was_asked_for(self, finished, capsys) -> None:
        assert fit(*finished, "--trainer.max_epochs=2", "--run.seed=5") == 78
        assert "run.seed was 0, now 5" in capsys.readouterr().err
        assert fit(*finished, "--trainer.max_epochs=2", "--run.resume=never") == 78
        assert "--run.resume never" in capsys.readouterr().err

    def test_fewer_epochs_than_are_done(self, finished, capsys) -> None:
        root, output = finished
        Path(output, "DONE").unlink()
        assert fit(root, output, "--trainer.max_epochs=1") == 78
        told = capsys.readouterr().err
        assert "--trainer.max_epochs is 1" in told
        assert "Traceback" not in told

    def test_a_refused_start_leaves_the_run_to_its_owner(self, finished) -> None:
        """Another configuration on the output of a run that is going on must not fence it off."""
        root, output = finished
        Path(output, "DONE").unlink()
        owner = Path(output, "checkpoints", "attempt").read_text()
        assert fit(root, output, "--trainer.max_epochs=2", "--optim.lr=1") == 78
        assert fit(root, output, "--trainer.max_epochs=1") == 78
        assert Path(output, "checkpoints", "attempt").read_text() == owner

    def test_when_no_checkpoint_is_good_it_begins_anew_and_says_so(self, finished, capsys) -> None:
        root, output = finished
        expected = last_state(output)
        Path(output, "DONE").unlink()
        for path in Path(output, "checkpoints").glob("*.ckpt"):
            path.write_bytes(path.read_bytes()[:-9])
        assert fit(root, output, "--trainer.max_epochs=2", "--run.resume=must") == 78
        assert fit(root, output, "--trainer.max_epochs=2") == 0
        told = capsys.readouterr().err
        assert told.count("using the previous checkpoint") == 4
        assert "no valid checkpoint found; starting from scratch" in told
        assert differences(expected, last_state(output)) == []
        assert len(list(Path(output, "checkpoints").glob("*.ckpt"))) == 2, "the damaged are gone"

    def test_leftovers_of_a_killed_start_go(self, finished) -> None:
        root, output = finished
        Path(output, "DONE").unlink()
        left = [
            Path(output, "logs", f".{'a' * 32}.lightship-tmp"),
            Path(output, "checkpoints", f".{'d' * 32}.lightship-tmp"),
            Path(output, "checkpoints", "step-00000007-00001-aaaaaa-9.ckpt"),
        ]
        for path in left:
            path.write_bytes(b"half")
        mine = Path(output, "checkpoints", "notes.txt")
        mine.write_text("not ours")
        assert fit(root, output, "--trainer.max_epochs=3") == 0
        assert [path for path in left if path.exists()] == []
        assert mine.exists()
