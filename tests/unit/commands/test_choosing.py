"""What a fit chooses by its training images and its net."""

from pathlib import Path

import pytest
import torch

from lightship import cli
from lightship.commands.base import Command
from lightship.commands.choosing import choose
from lightship.commands.doctor import load
from lightship.errors import ConfigError

FILE = """
model: {batch_norm: frozen, weights: w.pth}
data: {image_size_px: 64, sizes_px: [32, 48]}
optim: {lr: 0.01}
by_train_images: [{up_to: 300, trainer: {max_epochs: 7}, optim: {lr: 0.02}}, {optim: {lr: 0.03}}]
without_batch_norm: {data: {sizes_px: null}, model: {head_init: features}, optim: {lr: 1e-4}}
"""
OWN = "tests.support.own_nets"


def parsed(tmp_path: Path, net: str, text: str = FILE, *flags: str) -> Command:
    path = tmp_path / "one.yaml"
    path.write_text(text)
    command = cli.parse(["fit", f"--config={path}", f"--model.net={net}", *flags])
    assert isinstance(command, Command)
    return command


@pytest.mark.parametrize(
    ("net", "has_batch_norm"),
    [
        ("timm:test_vit", False), ("timm:test_convnext", False), ("resnet18", True),
        ("regnet_y_400mf", True), (f"{OWN}:pooled_linear", False), (f"{OWN}:moody", True),
        (f"{OWN}:normalised_first", False),
    ],
)  # fmt: skip
def test_the_net_decides(net: str, has_batch_norm: bool, tmp_path: Path) -> None:
    """regnet_y_400mf has no skeleton; InstanceNorm keeps no statistics."""
    command = parsed(tmp_path, net)
    state = torch.random.get_rng_state()
    choose(command, 220)
    assert torch.equal(torch.random.get_rng_state(), state)
    config = command.config
    assert config.optim.lr == (0.02 if has_batch_norm else 1e-4)
    assert config.data.sizes_px == ([32, 48] if has_batch_norm else None)
    assert config.model.head_init == ("random" if has_batch_norm else "features")
    assert config.trainer.max_epochs == 7


@pytest.mark.parametrize(
    ("net", "count", "line"),
    [
        ("resnet18", 301, "chosen for 301 training images: --optim.lr 0.03"),
        (
            "timm:test_vit", 1301,
            "chosen for 1,301 training images and a net without BatchNorm: --optim.lr 0.0001 "
            "--data.sizes_px null --model.head_init features",
        ),
        (
            "timm:test_vit", None,
            "chosen for a net without BatchNorm: --data.sizes_px null --model.head_init features "
            "--optim.lr 0.0001",
        ),
        ("resnet18", None, ""),
    ],
)  # fmt: skip
def test_the_line_says_what_was_chosen_and_why(
    net: str, count: int | None, line: str, tmp_path: Path
) -> None:
    assert choose(parsed(tmp_path, net), count) == line


def test_a_head_that_cannot_be_fitted_stays_random(tmp_path: Path) -> None:
    command = parsed(tmp_path, f"{OWN}:without_bias")
    assert "head_init" not in choose(command, 1)
    assert command.config.model.head_init == "random"
    assert command.config.optim.lr == 1e-4


def test_what_does_not_go_together_with_the_net_is_refused(tmp_path: Path) -> None:
    text = FILE.replace("{batch_norm: frozen, weights: w.pth}", "{weights: null}")
    command = parsed(tmp_path, "timm:test_vit", text)
    with pytest.raises(ConfigError, match="head_init features needs"):
        choose(command, 1)
    assert choose(parsed(tmp_path, "resnet18", text), 1), "which has BatchNorm"


@pytest.mark.parametrize(("net", "lr"), [("timm:test_vit", 1e-4), ("resnet18", 0.01)])
def test_doctor_checks_what_the_net_decides(net: str, lr: float, tmp_path: Path) -> None:
    command = parsed(tmp_path, net)
    load(command)
    assert command.config.optim.lr == lr


@pytest.mark.parametrize("net", ["timm:test_vit", "timm:deit_tiny_distilled_patch16_224"])
def test_the_head_of_a_transformer_is_fitted_first(net: str) -> None:
    command = cli.parse(["fit", "--config=finetune", f"--model.net={net}"])
    assert isinstance(command, Command)
    choose(command, 300)
    assert command.config.model.head_init == "features"
