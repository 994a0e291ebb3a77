"""Modes of BatchNorm in a fit, by the command, against statistics that are computed by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightship.cli import main
from lightship.data.batch import NOT_COUNTED
from lightship.training.callbacks.batch_norm import _batches
from tests.support.images import little_set, pixels_of, put
from tests.support.runs import last_state

NET = "tests.support.own_nets:moody"


def weights_after(tmp_path: Path, name: str, *flags: str, net: str = NET) -> dict:
    images = tmp_path / "images"
    if not images.exists():
        put(str(images), little_set(("train", "val"), per_class=8))
    common = [f"--data.root={images}", f"--run.output={tmp_path / name}", "--run.tracking=none"]
    common += ["--run.log_images=0", "--data.global_batch_size=6", "--trainer.max_epochs=2"]
    common += [f"--model.net={net}", "--optim.lr=0.01"]
    assert main(["fit", *common, *flags]) == 0
    return last_state(str(tmp_path / name))


@pytest.mark.parametrize("flags", [[], ["--model.ema_decay=0.9"], ["--trainer.max_steps=6"]])
def test_precise_statistics_are_those_of_the_training_images(
    flags: list[str], tmp_path: Path
) -> None:
    """The first layer's input does not depend on weights: the images as they are normalized."""
    state = weights_after(tmp_path, "run", "--model.batch_norm=precise", "--data.flip=true", *flags)
    model = state["hyper_parameters"]
    files = little_set(("train", "val"), per_class=8)
    images = np.stack([pixels_of(data) for path, data in files.items() if path[:5] == "train"])
    normal = (images / 255 - model["mean"]) / model["std"]
    pooled = normal.reshape(24, 4, 2, 4, 2, 3).mean(axis=(2, 4))
    kept = state["state_dict"]
    np.testing.assert_allclose(kept["net.1.running_mean"], pooled.mean(axis=(0, 1, 2)), atol=1e-6)
    found = kept["net.1.running_var"].numpy()
    count = 24 * 16
    np.testing.assert_allclose(found, pooled.var(axis=(0, 1, 2)) * count / (count - 1), rtol=1e-5)
    trained = weights_after(tmp_path, "train", "--data.flip=true", *flags)["state_dict"]
    for name, value in trained.items():
        is_statistic = "running" in name
        assert torch.equal(value, kept[name]) == (not is_statistic), name


def test_statistics_stay_where_no_batch_has_two_images(tmp_path: Path) -> None:
    files = little_set(("train",), per_class=1, classes=("ant", "bee"))
    files["train/bee/000.png"] = b"not an image"
    put(str(tmp_path / "images"), files | little_set(("val",), classes=("ant", "bee")))
    flags = ["--data.global_batch_size=1", "--data.on_error=skip", "--data.max_bad_fraction=1"]
    flags += ["--data.normalize=imagenet"]
    states = [
        weights_after(tmp_path, mode, *flags, f"--model.batch_norm={mode}")["state_dict"]
        for mode in ("train", "precise")
    ]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        assert bool(torch.isfinite(value).all()), name


@pytest.mark.parametrize(("count", "world_size"), [(1024, 1), (1000, 3), (65, 2), (24, 2), (3, 2)])
def test_batches_are_mixed_and_those_of_one_rank(count: int, world_size: int) -> None:
    batches = _batches(np.arange(count) * 2, world_size)
    assert len(batches) % world_size == 0
    alone = _batches(np.arange(count) * 2, 1)
    np.testing.assert_array_equal(batches[: len(alone)], alone)
    assert (batches[len(alone) :] == NOT_COUNTED).all()
    sizes = (alone != NOT_COUNTED).sum(axis=1)
    assert sizes.max() <= 64
    assert sizes.max() - sizes.min() <= 1
    taken = alone[alone != NOT_COUNTED]
    assert sorted(taken) == [*range(0, 2 * count, 2)]
    assert (np.diff(taken) < 0).any()


@pytest.mark.parametrize(("mode", "code"), [("frozen", 0), ("precise", 78)])
def test_only_precise_needs_batch_norm(
    mode: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(str(tmp_path / "images"), little_set(("train", "val"), per_class=8))
    flags = [f"--data.root={tmp_path / 'images'}", f"--run.output={tmp_path / 'run'}"]
    flags += ["--run.tracking=none", "--data.global_batch_size=6"]
    flags += ["--model.net=tests.support.own_nets:pooled_linear", f"--model.batch_norm={mode}"]
    flags += ["--trainer.max_steps=2", "--run.log_images=0"]
    assert main(["fit", *flags]) == code
    captured = capsys.readouterr()
    refusal = "has no BatchNorm layers that keep statistics"
    assert (refusal in captured.out + captured.err) == (code == 78)


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        ([], 78),
        (["--model.batch_norm=frozen"], 0),
        (["--model.freeze=backbone"], 0),
        (["--model.freeze=backbone", "--model.unfreeze_epoch=1"], 78),
    ],
)
def test_one_image_at_a_time_where_statistics_are_frozen(
    flags: list[str], code: int, tmp_path: Path
) -> None:
    put(str(tmp_path / "images"), little_set(("train", "val"), per_class=8))
    common = [f"--data.root={tmp_path / 'images'}", f"--run.output={tmp_path / 'run'}"]
    common += ["--run.tracking=none", "--data.global_batch_size=1", "--trainer.max_steps=2"]
    common += ["--run.log_images=0", "--model.net=tests.support.own_nets:squeezed", *flags]
    assert main(["fit", *common]) == code
