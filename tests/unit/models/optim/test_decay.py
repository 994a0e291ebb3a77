"""Which parameters weight decay acts on, and that a run that began before keeps its groups."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightship.cli import main
from lightship.models import classifier
from lightship.models.optim import decay
from lightship.models.optim.build import build_optimizer
from lightship.models.optim.decay import FIRST, decayed_parameters
from tests.support.images import little_set, put
from tests.support.runs import last_state


class Own(nn.Module):
    """With parameters of a module's own: one a matrix, the others none."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 4, stride=4)
        self.pos = nn.Parameter(torch.zeros(4, 6))
        self.prompt_token = nn.Parameter(torch.zeros(2, 6))
        self.layer_scale = nn.Parameter(torch.ones(6, 1, 1))
        self.mixing = nn.Parameter(torch.eye(6))
        self.norm, self.fc = nn.LayerNorm((4, 6)), nn.Linear(6, num_classes)
        self.gate = nn.Parameter(torch.ones(3, 6))

    def forward(self, images: Tensor) -> Tensor:
        tokens = (self.embed(images) * self.layer_scale).flatten(2).transpose(1, 2) + self.pos
        tokens = self.norm(tokens @ self.mixing)
        return self.fc(tokens.mean(1) + self.prompt_token.mean(0) + self.gate.mean(0))

    def no_weight_decay(self) -> set[str]:
        return {"ga*"}


def own(num_classes: int) -> nn.Module:
    return Own(num_classes)


def test_of_a_net_of_ones_own() -> None:
    assert decayed_parameters(own(3)) == {"embed.weight", "mixing", "fc.weight"}
    everything = {name for name, each in own(3).named_parameters() if each.ndim > 1}
    assert decayed_parameters(own(3), FIRST) == everything > {"pos", "layer_scale"}


@pytest.mark.parametrize("name", ["vit_b_32", "swin_t", "convnext_tiny", "resnet18"])
def test_of_torchvision(name: str) -> None:
    with torch.device("meta"):
        net = torchvision.models.get_model(name)
    excluded = decayed_parameters(net, FIRST) - decayed_parameters(net)
    expected = {
        "vit_b_32": {"class_token", "pos_embedding"},
        "swin_t": {"relative_position_bias_table"},
        "convnext_tiny": {"layer_scale"},
        "resnet18": set(),
    }
    assert {key.rpartition(".")[2] for key in excluded} == expected[name]


@pytest.mark.parametrize(
    "name",
    ["deit_tiny_patch16_224", "swinv2_tiny_window8_256", "levit_128s", "mvitv2_tiny", "resnet18"],
)
def test_of_timm_as_timm_has_it(name: str) -> None:
    timm, timm_optim = pytest.importorskip("timm"), pytest.importorskip("timm.optim")
    with torch.device("meta"):
        net = timm.create_model(name)
    excluded = net.no_weight_decay() if hasattr(net, "no_weight_decay") else ()
    groups = timm_optim.param_groups_weight_decay(net, 0.1, no_weight_decay_list=excluded)
    theirs = {id(each) for group in groups if group["weight_decay"] for each in group["params"]}
    assert decayed_parameters(net) == {
        key for key, each in net.named_parameters() if id(each) in theirs
    }


def test_an_update_decays_no_position() -> None:
    net = own(3)
    before = {name: each.detach().clone().fill_(1.0) for name, each in net.named_parameters()}
    with torch.no_grad():
        for each in net.parameters():
            each.fill_(1.0)
            each.grad = torch.zeros_like(each)
    build_optimizer(net, "adamw", lr=0.1, weight_decay=0.5).step()
    changed = {name for name, each in net.named_parameters() if not torch.equal(each, before[name])}
    assert changed == {"embed.weight", "mixing", "fc.weight"}


def test_a_run_that_began_before_keeps_its_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(str(tmp_path / "images"), little_set(("train", "val")))
    flags = ["--run.tracking=none", "--run.log_images=0", "--data.global_batch_size=6"]
    flags += [f"--data.root={tmp_path / 'images'}", "--optim.weight_decay=0.1"]
    flags += ["--model.net=tests.unit.models.optim.test_decay:own"]

    def groups(name: str, epochs: int) -> list[int]:
        output = [f"--run.output={tmp_path / name}", f"--trainer.max_epochs={epochs}"]
        assert main(["fit", *flags, *output]) == 0
        (state,) = last_state(str(tmp_path / name))["optimizer_states"]
        return [len(group["params"]) for group in state["param_groups"]]

    def as_before(self: classifier.ImageClassifier, checkpoint: dict) -> None:
        save(self, checkpoint)
        del checkpoint["decay"]

    save = classifier.ImageClassifier.on_save_checkpoint
    with monkeypatch.context() as before:
        before.setattr(decay, "NEWEST", FIRST)
        before.setattr(classifier.ImageClassifier, "on_save_checkpoint", as_before)
        assert groups("old", 1) == [9, 2]
    assert groups("old", 2) == [9, 2]
    assert groups("old", 3) == [9, 2]
    assert groups("new", 1) == [8, 3]
