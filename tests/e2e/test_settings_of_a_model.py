"""What a command on a trained model may set otherwise than the fit did, and what it may not."""

import csv
import json
from pathlib import Path

import pytest

from lightship import cli
from tests.support.images import little_set, put


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs `plain` and `flipped`, which differ in their test-time augmentation."""
    folder = tmp_path_factory.mktemp("trained")
    root = put(str(folder / "images"), little_set(("train", "val", "test"), per_class=8))
    flags = [
        f"--data.root={root}", "--run.tracking=none", "--data.image_size_px=16",
        "--data.global_batch_size=6", "--trainer.max_epochs=1", "--optim.lr=0.01",
        "--run.log_images=0",
    ]  # fmt: skip
    for name, flip in (("plain", "false"), ("flipped", "true")):
        output = f"--run.output={folder / name}"
        assert cli.main(["fit", *flags, output, f"--model.test_flip={flip}"]) == 0
    return folder


def of_run(folder: Path, name: str) -> list[str]:
    return [f"--run.output={folder / name}", "--ckpt_path=last"]


def measured(folder: Path, name: str, *flags: str) -> dict[str, float]:
    assert cli.main(["test", *of_run(folder, name), *flags]) == 0
    return json.loads((folder / name / "report" / "test.json").read_text())


@pytest.mark.parametrize("way", ["flag", "YAML"])
def test_test_time_augmentation_is_that_of_the_command(folder: Path, way: str) -> None:
    (folder / "true.yaml").write_text("model: {test_flip: true}")
    (folder / "false.yaml").write_text("model: {test_flip: false}")
    on, off = ("--model.test_flip=true", "--model.test_flip=false")
    if way == "YAML":
        on, off = f"--config={folder}/true.yaml", f"--config={folder}/false.yaml"
    plain, flipped = measured(folder, "plain"), measured(folder, "flipped")
    assert plain["test/loss"] != flipped["test/loss"]
    assert measured(folder, "plain", on) == flipped
    assert measured(folder, "flipped", off) == plain
    assert measured(folder, "plain", "--model.test_shift=true") not in (plain, flipped)


def test_a_prediction_with_another_augmentation_does_not_go_on_from_parts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightship.predict.shards.Parts.remove", lambda self: None)
    root, table = f"--data.root={folder}/images/test", f"--predictions={tmp_path}/t.csv"

    def predicted(name: str, *flags: str) -> list[dict[str, str]]:
        assert cli.main(["predict", *of_run(folder, name), root, table, *flags]) == 0
        return list(csv.DictReader((tmp_path / "t.csv").open()))

    expected = predicted("flipped")
    assert predicted("plain") != expected
    assert predicted("plain", "--model.test_flip=true") == expected


OTHERS = {
    "--data.image_size_px=12": "--data.image_size_px is 12; the checkpoint's image_size_px is 16",
    "--data.interpolation=bicubic": "bicubic; the checkpoint's interpolation is bilinear",
    "--data.eval_crop=0.5": "--data.eval_crop is 0.5; the checkpoint's eval_crop is 1.0",
    "--data.mean=0.1,0.1,0.1": "--data.mean is [0.1, 0.1, 0.1]; the checkpoint's mean is [0.",
    "--data.std=0.1,0.1,0.1": "--data.std is [0.1, 0.1, 0.1]; the checkpoint's std is [0.",
    "--data.normalize=none": "--data.normalize is none (mean [0.0, 0.0, 0.0]); the checkpoint's",
    "--data.normalize=imagenet": "--data.normalize is imagenet (mean [0.485",
    "--model.net=resnet18": "--model.net is resnet18; the checkpoint's net is litcnn",
    "--config=other.yaml": "--data.image_size_px is 24; the checkpoint's image_size_px is 16",
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("command", ["test", "validate", "predict", "export"])
def test_what_a_model_was_trained_with_is_not_ignored(
    folder: Path, command: str, other: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(folder)
    Path("other.yaml").write_text("data: {image_size_px: 24}")
    assert cli.main([command, *of_run(folder, "plain"), other]) == 78
    assert OTHERS[other] in capsys.readouterr().err


def test_the_models_own_values_may_be_given(folder: Path) -> None:
    own = [
        "--data.image_size_px=16", "--data.interpolation=bilinear", "--data.eval_crop=1",
        "--data.normalize=auto", "--model.net=litcnn", f"--config={folder}/plain/config.yaml",
    ]  # fmt: skip
    assert measured(folder, "plain", *own) == measured(folder, "plain")
