"""Fine-tuning by the command: weights, frozen layers that begin to train, kills in between."""

import io
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from lightship import config
from lightship.checkpoint.store import CheckpointStore
from lightship.cli import main
from lightship.commands import fit
from lightship.data import feature_store
from lightship.data.batch import Batch
from lightship.data.feature_store import FeatureStore
from lightship.data.images.resize import Resize, decode_square
from lightship.data.module import ImageData
from lightship.models.classifier import ImageClassifier
from lightship.models.head import Head
from lightship.run import config_file
from lightship.training import features
from lightship.training.callbacks import build
from tests.support.images import little_set, put
from tests.support.killing import (
    Job,
    assert_as_if_never_killed,
    features_in_small_parts,
    kill_at_step,
    kill_in_features,
    many_images,
)
from tests.support.own_nets import twenty_blocks
from tests.support.runs import last_state

NET = "tests.support.own_nets:twenty_blocks"
SQUEEZED = "tests.support.own_nets:squeezed"
TIMM_NET = "tf_efficientnet_lite0"
STAGED = [
    f"--model.net={NET}", "--model.freeze=stages:15", "--model.unfreeze_epoch=2",
    "--optim.layer_decay=0.8", "--optim.head_lr_scale=3", "--trainer.early_stopping_patience=0",
    "--data.image_size_px=12", "--data.sizes_px=8,10,12",
    "--model.head_init=features", "--model.batch_norm=precise", "--model.ema_decay=0.9",
]  # fmt: skip


def test_killed_before_and_after_layers_begin_to_train_and_sizes_change(tmp_path: Path) -> None:
    """Once in the pass that gives the head's features, once before and once after the 16th step.

    Of 32 steps, 8 an epoch.
    """
    images, prepare = many_images(str(tmp_path / "images")), features_in_small_parts
    unkilled = Job(tmp_path, str(tmp_path / "unkilled"), images, STAGED, prepare=prepare)
    ids = unkilled.finish()
    (tmp_path / "again").mkdir()
    job = Job(tmp_path / "again", str(tmp_path / "run"), images, [*STAGED], prepare=prepare)
    job.saving()
    numbers = random.Random(11)
    assert len(kill_in_features(job)) == 1, "of 6 parts"
    saved, begun = kill_at_step(job, numbers.randrange(4, 8))
    assert 0 < saved < 16 > begun, "layers do not train yet"
    saved, begun = kill_at_step(job, numbers.randrange(19, 24))
    assert 16 < saved < 32 > begun, "layers train"
    assert_as_if_never_killed(job, last_state(unkilled.output), ids)


def run(tmp_path: Path, name: str, *flags: str) -> dict:
    root = tmp_path / "images"
    if not root.exists():
        put(str(root), little_set(("train", "val", "test"), per_class=8))
    output = tmp_path / name
    common = [f"--data.root={root}", f"--run.output={output}", "--run.tracking=none"]
    common += ["--data.global_batch_size=6", "--run.log_images=0", f"--model.net={NET}"]
    assert main(["fit", *common, *flags]) == 0
    store = CheckpointStore(f"{output}/checkpoints")
    newest = store.newest()
    assert newest is not None
    return store.load_checkpoint(store.url_of(newest))


def test_frozen_layers_stay_bit_for_bit_and_train_from_their_epoch_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    start = twenty_blocks(5)
    with torch.no_grad():
        for name, value in start.named_buffers():
            value.mul_(0.5) if name.endswith("var") else value.add_(name.endswith("tracked"))
    torch.save(start.state_dict(), tmp_path / "w.pth")
    flags = [f"--model.weights={tmp_path / 'w.pth'}", "--optim.lr=0.01"]
    frozen = [*flags, "--model.freeze=stages:15"]
    one = run(tmp_path, "one", *frozen, "--trainer.max_epochs=2")
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "w.pth: loaded 120 of 122 tensors; fc.weight, fc.bias are new (" in said
    assert "frozen" in said
    kept = {
        name for name, value in start.state_dict().items()
        if name[:2] != "fc" and torch.equal(one["state_dict"][f"net.{name}"], value)
    }  # fmt: skip
    assert kept == {name for name in start.state_dict() if name.split(".")[0] in FIRST}
    (state,) = one["optimizer_states"]
    assert len(state["state"]) == 3 * 5 + 2, "frozen layers have no state of an optimizer"

    (tmp_path / "w.pth").unlink()  # a restart does not read it
    two = run(tmp_path, "one", *frozen, "--trainer.max_epochs=3")
    assert two["epoch"] > one["epoch"]
    assert torch.equal(two["state_dict"]["net.block3.conv.weight"], start.block3.conv.weight)


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_scale(tmp_path: Path) -> None:
    flags = ["--optim.lr=0.01", "--trainer.max_epochs=2"]
    start = twenty_blocks(5).state_dict()
    for mode, is_kept in (("frozen", True), ("train", False)):
        state = run(tmp_path, mode, *flags, f"--model.batch_norm={mode}")["state_dict"]
        kept = torch.equal(state["net.block3.bn.running_mean"], start["block3.bn.running_mean"])
        assert kept == is_kept, mode
        assert not torch.equal(state["net.block3.bn.weight"], start["block3.bn.weight"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--trainer.max_epochs=2"], [8, 8, 8, 8, 12, 12, 12, 12]),
        (["--trainer.max_epochs=50", "--trainer.max_steps=5"], [8, 8, 8, 8, 12]),
        (["--trainer.max_steps=4", "--trainer.limit_train_batches=2"], [8, 8, 12, 12]),
    ],
)
def test_sizes_are_those_of_the_epochs_that_run(
    flags: list[str], expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 24 images, 6 in a batch, each in two parts."""
    seen: list[int] = []
    step = ImageClassifier.training_step

    def watched(self: ImageClassifier, batch: Batch, index: int) -> torch.Tensor:
        seen.append(batch.images.shape[-1])
        return step(self, batch, index)

    monkeypatch.setattr(ImageClassifier, "training_step", watched)
    common = ["--data.image_size_px=12", "--data.sizes_px=8,12"]
    run(tmp_path, "run", *common, "--trainer.accumulate_grad_batches=2", *flags)
    assert seen[::2] == seen[1::2] == expected


FIRST = {f"block{number}" for number in range(15)}


@pytest.mark.parametrize("recipe", ["finetune", "finetune-probe"])
def test_what_the_recipes_train(recipe: str, tmp_path: Path) -> None:
    """Of random weights: the recipe's frozen stages, its statistics and what trains."""
    net = timm.create_model(TIMM_NET, num_classes=5)
    weights = tmp_path / "w.safetensors"
    save_file(net.state_dict(), weights)
    small = ["--data.image_size_px=32", "--trainer.max_epochs=1"]
    small += ["--data.sizes_px=32"] if recipe == "finetune" else []
    images = f"--config={recipe}", f"--model.weights={weights}", "--model.net=timm:" + TIMM_NET
    trained = run(tmp_path, "run", *images, *small)["state_dict"]
    same = {
        name
        for name, value in net.state_dict().items()
        if torch.equal(value, trained[f"net.{name}"]) or "num_batches" in name
    }
    head = {"classifier.weight", "classifier.bias"}
    frozen = {name for name in net.state_dict() if name not in head}
    if recipe == "finetune":
        first = ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.")
        frozen = {name for name in frozen if name.startswith(first) or "running" in name}
        frozen |= {name for name in net.state_dict() if "num_batches" in name}
    assert same == frozen


@pytest.mark.parametrize("net", ["test_vit", "test_convnext"])
def test_the_recipe_trains_nets_without_batch_norm(
    net: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All layers, at one size; `fit`, `--print_config` and the next start make the same choice."""
    state = timm.create_model(net, num_classes=1000).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    flags = ["--config=finetune", f"--model.net=timm:{net}", "--data.image_size_px=64"]
    flags += [f"--model.weights={tmp_path / 'w.safetensors'}", "--optim.layer_decay=0.6"]
    trained = run(tmp_path, "run", *flags, "--trainer.max_epochs=1")["state_dict"]
    shown = capsys.readouterr().err
    rates = shown[shown.index("parameters and peak learning rates") :].splitlines()[0]
    chosen = "chosen for a net without BatchNorm: --data.sizes_px null --model.freeze none"
    assert f"{chosen} --model.head_init features --optim.lr 0.0001" in shown
    assert "--model.head_init features: from 24 training images" in shown
    assert "--optim.layer_decay" not in shown, "a flag wins"
    differs = {name for name in state if not torch.equal(state[name], trained[f"net.{name}"])}
    assert {"head.weight", "patch_embed.proj.weight"} <= differs or "stem.0.weight" in differs
    root = f"--data.root={tmp_path / 'images'}"
    assert main(["fit", root, *flags, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert f"# {rates}\n" in printed
    assert "sizes_px: null\n" in printed
    assert "layer_decay: 0.6\n" in printed

    run(tmp_path, "run", *flags, "--trainer.max_epochs=2")
    assert "chosen by the run's first start: --data.sizes_px null" in capsys.readouterr().err
    kept = config_file.read(str(tmp_path / "run"))
    assert (kept["optim"]["lr"], kept["optim"]["layer_decay"]) == (1e-4, 0.6)
    assert (kept["model"]["freeze"], kept["trainer"]["gradient_clip_val"]) == ("none", 1.0)


class Killed(BaseException):
    """In place of a kill."""


@pytest.mark.parametrize("mode", ["resident", "streaming"])
def test_a_head_from_features(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A restart computes no feature again; the head is fitted before the first step."""
    monkeypatch.setattr(features, "_BATCH", 4)
    monkeypatch.setattr(feature_store, "ROWS", 8)
    monkeypatch.setattr(feature_store, "_AT_ROWS", (slice(None, 8), slice(8, None)))
    seen: list[int] = []
    compute = Head.features

    def counted(self: Head, pixels: torch.Tensor) -> torch.Tensor:
        if not seen_in_check():
            seen.append(len(pixels))
            if len(seen) == until:
                raise Killed
        return compute(self, pixels)

    monkeypatch.setattr(Head, "features", counted)
    flags = [f"--data.mode={mode}", "--model.head_init=features", "--trainer.max_epochs=1"]
    flags += ["--optim.lr=0"]
    until = 99
    whole = run(tmp_path, "whole", *flags)
    assert seen == [4] * 6, "24 training images, each once"
    captured = capsys.readouterr()
    assert "--model.head_init features: from 24 training images; L2 " in captured.out + captured.err
    assert not (tmp_path / "whole" / "features").exists()

    seen.clear()
    until = 4
    with pytest.raises(Killed):
        run(tmp_path, "killed", *flags)
    seen.clear()
    until = 99
    again = run(tmp_path, "killed", *flags)
    assert seen == [4] * 5, "16 of 24 were left; 4 are compared with those that are kept"
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, again["state_dict"][name]), name
    random = run(tmp_path, "random", *flags, "--model.head_init=random")["state_dict"]
    for name, value in whole["state_dict"].items():
        is_buffer = "running" in name or "tracked" in name
        assert is_buffer or torch.equal(value, random[name]) == (".fc." not in name), name

    seen.clear()
    run(tmp_path, "whole", *flags, "--trainer.max_epochs=2")
    assert not seen, "a resumed run has its head"


@pytest.mark.parametrize("changed", ["nothing", "net", "image"])
def test_features_of_another_net_or_file_are_computed_again(
    changed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that is killed in the pass over the validation split; all of train is kept."""
    compute, load = Head.features, FeatureStore.load

    def listed(self: ImageData, split: str, batches: np.ndarray) -> object:
        if split == "val":
            raise Killed
        return listed_dataloader(self, split, batches)

    def write(seed: int) -> None:
        """Other pixels in a file of the same size."""
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images/train/ant/000.png", compress_level=0)

    put(str(tmp_path / "images"), little_set(("train", "val"), per_class=8))
    write(0)
    listed_dataloader = ImageData.listed_dataloader
    flags = ["--model.freeze=backbone", "--trainer.max_epochs=1", "--data.normalize=imagenet"]
    with monkeypatch.context() as dying:
        dying.setattr(ImageData, "listed_dataloader", listed)
        with pytest.raises(Killed):
            run(tmp_path, "run", *flags)
    counts: list[int] = []
    loaded: list[int] = []

    def noted(self: FeatureStore) -> tuple[int, np.ndarray]:
        done, again = load(self)
        loaded.append(done)
        return done, again

    def counted(self: Head, pixels: torch.Tensor) -> torch.Tensor:
        counts.append(len(pixels))
        return compute(self, pixels) * (1.2 if changed == "net" else 1)

    if changed == "image":
        write(1)
    monkeypatch.setattr(Head, "features", counted)
    monkeypatch.setattr(Head, "check", lambda *_: None)
    monkeypatch.setattr(FeatureStore, "load", noted)
    capsys.readouterr()
    run(tmp_path, "run", *flags)
    assert loaded == [0 if changed == "image" else 24, 0]
    line = "train: the net gives other features than those kept; they are computed again"
    assert (line in capsys.readouterr().err) == (changed == "net")
    trials = 2  # of `FrozenBackbone`
    assert counts[:trials] == [8, 8]
    assert counts[trials:] == [64] * (3 if changed == "net" else 2), "train again, or compared; val"


def test_a_restart_counts_the_unreadable_images_of_the_features_it_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two bad images are in the first part of 8 rows, one after it; the bound allows two."""
    monkeypatch.setattr(features, "_BATCH", 4)
    monkeypatch.setattr(feature_store, "ROWS", 8)
    monkeypatch.setattr(feature_store, "_AT_ROWS", (slice(None, 8), slice(8, None)))
    put(str(tmp_path / "images"), little_set(("train", "val"), per_class=8))
    for name in ("ant/001", "ant/003", "cat/002"):
        (tmp_path / f"images/train/{name}.png").write_bytes(b"no image")
    compute, count = Head.features, [0]

    def killed_in_the_fourth(self: Head, pixels: torch.Tensor) -> torch.Tensor:
        count[0] += not seen_in_check() and len(pixels) == features._BATCH
        if count[0] == 4:
            raise Killed
        return compute(self, pixels)

    flags = ["--data.mode=streaming", "--model.freeze=backbone", "--trainer.max_epochs=1"]
    flags += ["--data.on_error=skip", "--data.image_size_px=8"]
    with monkeypatch.context() as dying:
        dying.setattr(Head, "features", killed_in_the_fourth)
        with pytest.raises(Killed):
            run(tmp_path, "run", *flags, "--data.max_bad_fraction=0.2")
    assert [path.name[-9:] for path in (tmp_path / "run/features/train").iterdir()] == ["00000.npz"]
    common = [f"--data.root={tmp_path / 'images'}", f"--run.output={tmp_path / 'run'}"]
    common += ["--run.tracking=none", "--data.global_batch_size=6", "--run.log_images=0"]
    capsys.readouterr()
    flags += [f"--model.net={NET}", "--data.max_bad_fraction=0.1"]
    assert main(["fit", *common, *flags]) == 65
    assert "at least 3 of 24 images are bad" in capsys.readouterr().err


def watched_forward(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Dimensions of what the model gets in fits: 4 of images, 2 of features."""
    forward, dimensions = ImageClassifier.forward, set()

    def watched(self: ImageClassifier, images: torch.Tensor) -> torch.Tensor:
        if self._trainer is not None and self.trainer.state.fn == "fit":
            dimensions.add(images.ndim)
        return forward(self, images)

    monkeypatch.setattr(ImageClassifier, "forward", watched)
    return dimensions


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.net=tests.support.own_nets:moody"],  # dropout before the head
        ["--data.flip=true"],
        ["--model.unfreeze_epoch=1"],
        ["--data.resident_gib=0.0000001", "--data.mode=streaming"],
    ],
)
def test_what_differs_by_the_epoch_is_computed_in_each(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dimensions = watched_forward(monkeypatch)
    run(tmp_path, "run", "--model.freeze=backbone", "--trainer.max_epochs=2", *flags)
    assert dimensions == {4}


def seen_in_check() -> bool:
    """Whether `Head.check` is the caller of the caller."""
    return sys._getframe(2).f_code.co_name == "check"


@pytest.mark.parametrize(
    ("mode", "flags"),
    [("streaming", []), ("resident", ["--model.head_init=features", "--model.ema_decay=0.9"])],
)
def test_a_frozen_backbone_computes_features_once(
    mode: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that of a fit on images; a restart computes none again."""
    flags = [*flags, f"--data.mode={mode}", "--model.freeze=backbone", "--optim.lr=0.01"]
    flags += ["--trainer.max_epochs=3"]
    with monkeypatch.context() as without:
        without.setattr(build, "uses_features", lambda config: False)
        images = run(tmp_path, "images", *flags)
    rows: list[int] = []
    compute = Head.features

    def counted(self: Head, pixels: torch.Tensor) -> torch.Tensor:
        if not seen_in_check() and len(pixels) == features._BATCH:
            rows.append(len(pixels))
        return compute(self, pixels)

    monkeypatch.setattr(features, "_BATCH", 4)
    monkeypatch.setattr(Head, "features", counted)
    shapes = watched_forward(monkeypatch)
    once = run(tmp_path, "once", *flags)
    assert shapes == {2}, "training and validation are on features"
    tried = 4 * ("--model.head_init=features" in flags)  # of those that the head was fitted to
    assert sum(rows) == 24 + 24 + tried, "each image of train and val once"
    assert once["lightship"]["score"] == pytest.approx(images["lightship"]["score"], abs=1e-5)
    for name, value in images["state_dict"].items():
        assert torch.allclose(value, once["state_dict"][name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.freeze=all"], "--model.freeze is 'all'; it must be none, backbone or stages:N"),
        (["--model.freeze=stages:0"], "it must be none, backbone or stages:N"),
        (
            ["--model.head_init=features", "--model.net=litcnn"],
            "--model.head_init features needs --model.weights",
        ),
        (
            ["--model.head_init=features", "--model.net=tests.support.own_nets:branching"],
            "needs a net that ends with one Linear or 1x1 Conv2d layer with a bias",
        ),
        (
            ["--model.freeze=backbone", "--model.net=resnet18"],
            "--model.freeze backbone needs --model.weights: resnet18 starts from random weights",
        ),
        (
            [f"--model.net={SQUEEZED}", "--data.image_size_px=12", "--data.sizes_px=2,12"],
            "set --data.sizes_px (most published nets take 224)",
        ),
        (["--model.freeze=stages:21"], "has 20 stages before its head (block0, block1,"),
        (["--model.unfreeze_epoch=1"], "--model.unfreeze_epoch needs --model.freeze"),
        (
            ["--optim.name=muon-sgd", "--optim.layer_decay=0.9"],
            "--optim.layer_decay does nothing with",
        ),
    ],
)
def test_wrong_settings(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(str(tmp_path / "images"), little_set(("train",), per_class=8))
    common = [f"--data.root={tmp_path / 'images'}", f"--run.output={tmp_path / 'run'}"]
    common += ["--run.tracking=none", "--data.global_batch_size=6", f"--model.net={NET}"]
    assert main(["fit", *common, *flags]) == 78
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


def test_a_run_whose_frozen_layers_are_random_is_still_of_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older version trained it; and a checkpoint has weights for the frozen layers."""
    net, frozen = ["--model.net=litcnn", "--data.image_size_px=16"], ["--model.freeze=backbone"]
    net += ["--trainer.max_epochs=1"]
    with monkeypatch.context() as before:
        before.setattr(config, "_check_fine_tuning", lambda *_: None)
        run(tmp_path, "old", *net, *frozen)
    output = f"--run.output={tmp_path / 'old'}"
    for command in ("test", "validate", "predict", "export"):
        assert main([command, output, "--run.tracking=none"]) == 0, command
    run(tmp_path, "old", *net, *frozen, "--ckpt_path=last")  # it resumes from what it has
    trained = run(tmp_path, "trained", *net)["state_dict"]
    store = CheckpointStore(str(tmp_path / "trained" / "checkpoints"))
    further = [*net, *frozen, f"--model.weights={store.url_of(store.newest())}"]
    state = run(tmp_path, "further", *further)["state_dict"]
    kept = [name for name in trained if torch.equal(trained[name], state[name])]
    assert 0 < len(kept) < len(trained)


def test_what_a_fit_chose_stays_when_its_command_runs_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the weights and by the number of images; a set with train/ and val/ only."""
    root = put(str(tmp_path / "images"), little_set(("train", "val"), per_class=8))
    common = [f"--data.root={root}", f"--run.output={tmp_path / 'one'}", "--run.tracking=none"]
    common += ["--run.log_images=0", f"--model.net={NET}"]
    first = [*common, "--trainer.max_epochs=1", "--data.image_size_px=8", "--data.mean=0.5,0.4,0.3"]
    assert main(["fit", *first, "--data.global_batch_size=6", "--data.eval_crop=0.9"]) == 0
    store = CheckpointStore(f"{tmp_path / 'one'}/checkpoints")
    weights = store.url_of(store.newest())

    recipe = tmp_path / "mine.yaml"
    rows = "[{up_to: 10, data: {global_batch_size: 2}}, "
    rows += "{up_to: 24, data: {global_batch_size: 4}, trainer: {max_epochs: 3}}, {}]"
    recipe.write_text(f"by_train_images: {rows}")
    again = [flag.replace(str(tmp_path / "one"), str(tmp_path / "two")) for flag in common]
    again += [f"--model.weights={weights}", f"--config={recipe}"]
    capsys.readouterr()
    assert main(["fit", *again, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "max_epochs: 3\n" in printed
    assert "global_batch_size: 4\n" in printed
    assert "\n# 24 training images\n# parameters and peak learning rates: head 27 at" in printed

    assert main(["fit", *again, "--run.resume=auto"]) == 0
    assert "chosen for 24 training images: --data.global_batch_size 4" in capsys.readouterr().err
    kept = config_file.read(str(tmp_path / "two"))
    assert kept["data"]["image_size_px"] == 8
    assert (kept["data"]["eval_crop"], kept["trainer"]["max_epochs"]) == (0.9, 3)
    for number in range(3):  # more images than at the first start: another row
        (tmp_path / f"images/train/ant/more{number}.png").write_bytes(b"not read again")
    assert main(["fit", *again]) == 0, "an earlier start's choice, not a new one"
    assert "run already complete" in capsys.readouterr().err
    assert main(["fit", *again, "--trainer.max_epochs=4"]) == 0
    shown = capsys.readouterr().err
    assert "training ended at step 24" in shown
    assert "chosen by the run's first start: --data.global_batch_size 4\n" in shown

    kept_path = tmp_path / "two" / "config.yaml"
    whole = kept_path.read_text()
    for damage in ("0", "many"):
        kept_path.write_text(whole.replace("batch_size: 4", f"batch_size: {damage}"))
        assert main(["fit", *again, "--trainer.max_epochs=5"]) == 78
        shown = capsys.readouterr().err
        shown = " ".join(shown.replace("'", "").split())
        assert f"two/config.yaml: data.global_batch_size is {damage}" in shown


def test_a_start_without_a_checkpoint_leaves_the_choice_by_size_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The images may have been uploaded in part when it counted them."""
    root = put(str(tmp_path / "images"), little_set(("train", "val"), per_class=4))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "by_train_images: [{up_to: 12, data: {global_batch_size: 2}}, "
        "{data: {global_batch_size: 4}}]"
    )
    flags = [f"--data.root={root}", f"--run.output={tmp_path / 'run'}", f"--config={recipe}"]
    flags += ["--run.tracking=none", "--run.log_images=0", f"--model.net={NET}"]
    flags += ["--trainer.max_epochs=1"]

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as dying:
        dying.setattr(fit, "_build_model", killed)
        with pytest.raises(Killed):
            main(["fit", *flags])
    assert "chosen for 12 training images: --data.global_batch_size 2" in capsys.readouterr().err
    assert config_file.read(str(tmp_path / "run"))["data"]["global_batch_size"] == 2
    more = little_set(("train", "val"), per_class=8)
    put(root, {path: data for path, data in more.items() if path[-7:] >= "004.png"})
    assert main(["fit", *flags]) == 0
    assert "chosen for 24 training images: --data.global_batch_size 4" in capsys.readouterr().err


def test_a_start_without_a_checkpoint_leaves_the_preprocessing_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of weights may be another one by then."""
    root = put(str(tmp_path / "images"), little_set(("train", "val"), per_class=4))
    flags = [f"--data.root={root}", "--run.tracking=none", "--run.log_images=0"]
    flags += [f"--model.net={NET}", "--trainer.max_epochs=1", "--data.global_batch_size=6"]
    paths = []
    for size_px in (8, 10):
        of_size = [f"--run.output={tmp_path / str(size_px)}", f"--data.image_size_px={size_px}"]
        assert main(["fit", *flags, *of_size]) == 0
        store = CheckpointStore(f"{tmp_path / str(size_px)}/checkpoints")
        paths.append(Path(store.url_of(store.newest())))
    weights = tmp_path / "w.ckpt"
    flags += [f"--model.weights={weights}", f"--run.output={tmp_path / 'run'}"]

    def killed(*_: object, **__: object) -> None:
        raise Killed

    weights.write_bytes(paths[0].read_bytes())
    with monkeypatch.context() as dying:
        dying.setattr(fit, "_build_model", killed)
        with pytest.raises(Killed):
            main(["fit", *flags])
    assert config_file.read(str(tmp_path / "run"))["data"]["image_size_px"] == 8
    weights.write_bytes(paths[1].read_bytes())
    assert main(["fit", *flags]) == 0
    assert config_file.read(str(tmp_path / "run"))["data"]["image_size_px"] == 10


@pytest.mark.parametrize("mode", ["resident", "streaming"])
def test_every_command_sees_the_same_pixels(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without augmentation: training, validation, test, prediction, export and `decode_square`."""
    generator = np.random.default_rng(3)
    expected = set()
    for number in range(12):
        out = io.BytesIO()
        pixels = generator.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(out, "PNG")
        for split in ("train", "val", "test"):
            path = tmp_path / "images" / split / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(out.getvalue())
        square = decode_square(out.getvalue(), "image", 24, resize=Resize("bicubic", 0.75))
        expected.add(np.ascontiguousarray(square.transpose(2, 0, 1)).tobytes())
    seen: dict[str, set[bytes]] = {}
    forward = ImageClassifier.forward

    def recorded(self: ImageClassifier, images: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_exporting() and images.any():
            rows = {row.contiguous().numpy().tobytes() for row in images}
            seen.setdefault("train" if self.training else command, set()).update(rows)
        return forward(self, images)

    monkeypatch.setattr(ImageClassifier, "forward", recorded)
    output = f"--run.output={tmp_path / 'run'}"
    data = [f"--data.root={tmp_path / 'images'}", f"--data.mode={mode}"]
    settings = ["--data.image_size_px=24", "--data.interpolation=bicubic", "--data.eval_crop=0.75"]
    fit = ["--run.tracking=none", "--run.log_images=0", "--trainer.max_epochs=1"]
    fit += [f"--model.net={NET}", "--data.global_batch_size=6", *settings]
    command = "fit"
    assert main(["fit", *data, output, *fit]) == 0
    for command, root in (("validate", ""), ("test", ""), ("predict", "/test"), ("export", "")):
        where = [f"--data.root={tmp_path / 'images'}{root}", f"--data.mode={mode}"]
        assert main([command, *where, output, "--model.trust=true"]) == 0
    assert seen.keys() == {"train", "fit", "validate", "test", "predict", "export"}
    for name, pixels in seen.items():
        assert pixels == expected, name
