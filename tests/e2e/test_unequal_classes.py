"""Classes of unequal size: weights in the loss, and metrics that are means over classes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score, f1_score

from lightship import cli
from lightship.checkpoint.store import CheckpointStore
from lightship.commands import fit as run
from lightship.models.classifier import ImageClassifier
from tests.support.images import encoded, pixels_of, put
from tests.support.runs import differences, last_state

COUNTS = {"ant": 24, "bee": 8, "cat": 4}
NET = "--model.net=tests.support.own_nets:pooled_linear"
FIT = [
    "fit", "--data.root=images", "--run.tracking=none", "--run.log_images=0",
    NET, "--data.global_batch_size=6",
    "--optim.name=adamw", "--optim.lr=0.02", "--trainer.max_epochs=4",
    "--model.class_weights=balanced", "--model.loss=focal", "--trainer.monitor=val/f1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes of three sizes, which their brightness tells apart, not quite."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "write_report", lambda *_: None)
    rng = np.random.default_rng(0)
    files = {
        f"{split}/{name}/{i:03d}.png": encoded(
            (40 * label + rng.integers(0, 100) + rng.integers(0, 60, (8, 8, 3))).astype(np.uint8)
        )
        for split in ("train", "val", "test")
        for label, (name, count) in enumerate(COUNTS.items())
        for i in range(count)
    }
    put("images", files)


def newest() -> dict:
    store = CheckpointStore("run/checkpoints")
    commit = store.newest()
    assert commit is not None
    return store.load_checkpoint(store.url_of(commit))


def test_weights_are_said_and_stored_and_the_metric_chooses_the_best(capsys) -> None:
    output = "--run.output=run"
    assert cli.main([*FIT, output, "--run.keep_last=9"]) == 0
    said = capsys.readouterr().err
    assert said.count("class weights: 0.5 (ant) to 3 (cat)") == 1
    assert newest()["hyper_parameters"]["class_weights"] == [0.5, 1.5, 3.0]

    records = [json.loads(path.read_text()) for path in Path("run/checkpoints").glob("*.json")]
    scored = {each["step"]: each for each in records if each["score"] is not None}
    assert {(each["monitor"], each["mode"]) for each in scored.values()} == {("val/f1", "max")}
    best = max(scored.values(), key=lambda each: (each["score"], -each["step"]))
    done = json.loads(Path("run/DONE").read_text())
    assert done["best_step"] == best["step"]
    assert done["val/f1"] == best["score"]
    assert len({each["score"] for each in scored.values()}) > 1, "there was something to choose"

    assert cli.main(["test", NET, output, "--ckpt_path=best"]) == 0
    tested = json.loads(Path("run/report/test.json").read_text())
    assert tested == {name: done[name] for name in tested}
    assert (
        cli.main(["predict", NET, output, "--data.root=images/test", "--predictions=t.jsonl"]) == 0
    )
    rows = [json.loads(line) for line in Path("t.jsonl").read_text().splitlines()]
    truth, guesses = [row["path"].split("/")[0] for row in rows], [row["class"] for row in rows]
    assert tested["test/f1"] == pytest.approx(f1_score(truth, guesses, average="macro"))
    assert tested["test/balanced_acc"] == pytest.approx(balanced_accuracy_score(truth, guesses))

    assert cli.main([*FIT, output, "--model.class_weights=none"]) == 78
    assert "model.class_weights was 'balanced', now 'none'" in capsys.readouterr().err


def test_a_resumed_run_is_as_if_never_stopped() -> None:
    assert cli.main([*FIT, "--run.output=whole"]) == 0
    for steps in (9, -1):
        Path("run/DONE").unlink(missing_ok=True)
        assert cli.main([*FIT, "--run.output=run", f"--trainer.max_steps={steps}"]) == 0
    whole, resumed = last_state("whole"), last_state("run")
    for each in (whole, resumed):
        del each["metrics.csv"]  # has a row more, of the first one's last step
    assert differences(whole, resumed) == []


def test_a_head_from_features_is_fitted_with_the_weights() -> None:
    """At its optimum the weighted errors of each class, the bias's gradient, have the mean 0."""
    flags = ["--model.head_init=features", "--optim.lr=0", "--trainer.max_epochs=1"]
    assert cli.main([*FIT, "--run.output=run", *flags]) == 0
    model = ImageClassifier.from_checkpoint(newest(), NET.partition("=")[2]).eval()
    files = sorted(Path("images/train").rglob("*.png"))
    images = torch.stack([torch.from_numpy(pixels_of(file.read_bytes())) for file in files])
    labels = torch.tensor([[*COUNTS].index(file.parent.name) for file in files])
    with torch.no_grad():
        errors = model(images.permute(0, 3, 1, 2)).softmax(1) - F.one_hot(labels, 3)
    weights = torch.tensor([0.5, 1.5, 3.0])[labels, None]
    assert (weights * errors).mean(0).abs().max() < 1e-5
    assert errors.mean(0).abs().max() > 0.02


def test_a_metric_that_this_set_does_not_have(capsys) -> None:
    assert cli.main([*FIT, "--run.output=run", "--trainer.monitor=val/top5"]) == 78
    assert (
        "--trainer.monitor is val/top5, which needs more than 5 classes; --data.root has 3: "
        "choose one of val/loss, val/acc, val/balanced_acc, val/f1"
    ) in capsys.readouterr().err
    assert not list(Path("run/checkpoints").glob("*.ckpt"))


def test_no_metric(capsys) -> None:
    assert cli.main([*FIT, "--run.output=run", "--trainer.monitor=val/auc"]) == 2
    assert (
        "--trainer.monitor is 'val/auc'; it must be one of val/loss, val/acc, val/balanced_acc, "
        "val/f1, val/top5"
    ) in capsys.readouterr().err


def test_a_focus_without_focal_loss(capsys) -> None:
    flags = ["--model.loss=cross_entropy", "--model.focal_gamma=3", "--run.output=run"]
    assert cli.main([*FIT, *flags]) == 78
    assert "--model.focal_gamma 3 needs --model.loss focal" in capsys.readouterr().err
