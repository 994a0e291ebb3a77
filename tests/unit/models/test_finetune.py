"""Fine-tuning: what is frozen, how fast the rest trains, and that a frozen layer stays as it is."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from lightship.errors import ConfigError
from lightship.models.finetune import frozen_parameters, lr_scales, rates_line, set_frozen
from lightship.models.nets.speednet import speednet
from lightship.models.nets.structure import head_parameters, layers
from lightship.models.optim.build import build_optimizer
from tests.support.own_nets import twenty_blocks


def resnet(**changes) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=4, **changes)


STAGES = {
    "resnet18": ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"],
    "efficientnet_b0": [*(f"features.{n}" for n in range(9)), "classifier.1"],
    "vit_b_32": [
        "class_token",
        *(f"encoder.layers.encoder_layer_{n}" for n in range(12)),
        "heads.head",
    ],
    "timm:resnet18": ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"],
    "timm:tf_efficientnet_lite0": ["conv_stem", *(f"blocks.{n}" for n in range(7)), "classifier"],
    "timm:convnext_atto": ["stem", *(f"stages.{n}" for n in range(4)), "head.fc"],
}


def built(name: str) -> nn.Module:
    with torch.device("meta"):
        if name.startswith("timm:"):
            return pytest.importorskip("timm").create_model(name.removeprefix("timm:"))
        return torchvision.models.get_model(name)


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_the_nets_own(name: str) -> None:
    net, titles = built(name), STAGES[name]
    found = layers(net, coarse=True)
    assert len(found) == len(titles)
    assert all(each.title.startswith(title) for each, title in zip(found, titles, strict=True))


NETS = [*STAGES, "densenet121", "swin_t", "vgg11", "googlenet", "timm:rdnet_tiny"]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("coarse", [False, True])
def test_layers_hold_every_parameter_once_with_the_head_last(name: str, coarse: bool) -> None:
    net = built(name)
    found = layers(net, coarse)
    names = [parameter for layer in found for parameter in layer.parameters]
    assert sorted(names) == sorted(key for key, _ in net.named_parameters())
    assert found[-1].parameters == head_parameters(net)
    assert len(found) >= 4


def test_rates_fall_by_depth_as_those_of_timm() -> None:
    timm, optim = pytest.importorskip("timm"), pytest.importorskip("timm.optim")
    net = timm.create_model("tf_efficientnet_lite0", num_classes=4)
    scales = lr_scales(net, 0.8, 1.0)
    groups = optim.param_groups_layer_decay(net, weight_decay=0.1, layer_decay=0.8)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    theirs = {names[id(each)]: group["lr_scale"] for group in groups for each in group["params"]}
    assert scales == pytest.approx(theirs)
    assert lr_scales(net, 0.8, 5.0) == {
        name: 5.0 if name.startswith("classifier") else scale for name, scale in scales.items()
    }
    assert lr_scales(net, 1.0, 1.0) == {}


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "muon"])
def test_an_update_is_scaled_by_depth(name: str) -> None:
    """Against the same optimizer without scales: its step of each tensor, times the factor."""
    plain = twenty_blocks(4)
    scaled = copy.deepcopy(plain)
    before = copy.deepcopy(plain.state_dict())
    images = torch.randn(6, 3, 8, 8)
    for net, options in ((plain, {}), (scaled, {"layer_decay": 0.5, "head_lr_scale": 4.0})):
        optimizer = build_optimizer(net, name, lr=1e-3, weight_decay=0.1, **options)
        nn.functional.cross_entropy(net(images), torch.arange(6) % 4).backward()
        optimizer.step()
    scales = lr_scales(plain, 0.5, 4.0)
    assert scales["fc.weight"] == 4
    assert scales["block19.conv.weight"] == 0.5
    assert scales["block14.conv.weight"] == 0.5**6
    assert scales["block0.bn.bias"] == 0.01, "no layer stands still"
    for key, parameter in plain.named_parameters():
        step, its = parameter - before[key], scaled.get_parameter(key) - before[key]
        torch.testing.assert_close(its, step * scales[key], rtol=1e-2, atol=1e-7)


def test_without_fine_tuning_the_groups_are_as_before() -> None:
    net = twenty_blocks(4)
    groups = build_optimizer(net, "adamw", weight_decay=0.1).param_groups
    assert [len(group["params"]) for group in groups] == [21, 41]
    assert all("lr_scale" not in group for group in groups)


def test_what_is_frozen() -> None:
    net = resnet()
    assert frozen_parameters(net, "resnet18", "none") == []
    backbone = frozen_parameters(net, "resnet18", "backbone")
    assert {name for name, _ in net.named_parameters()} - set(backbone) == {"fc.weight", "fc.bias"}
    assert frozen_parameters(net, "resnet18", "stages:5") == backbone
    two = frozen_parameters(net, "resnet18", "stages:2")
    assert {name.partition(".")[0] for name in two} == {"conv1", "bn1", "layer1"}
    net.conv1.weight.requires_grad_(False)  # by the net itself: it stays so
    assert "conv1.weight" not in frozen_parameters(net, "resnet18", "backbone")
    with pytest.raises(ConfigError, match=r"stages:6: resnet18 has 5 stages .*\(conv1, layer1, "):
        frozen_parameters(net, "resnet18", "stages:6")


def test_a_frozen_layer_keeps_weights_statistics_and_drops_nothing() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5)),
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(4, 2),
    )  # fmt: skip
    names = frozen_parameters(net, "net", "stages:2")
    assert set_frozen(net, names, True)
    assert not set_frozen(net, names, True)
    modes = [part.training for part in net]
    assert modes == [False, False, False, True, True, True, True, True, True]
    assert not net[2][1].training
    before = copy.deepcopy(net.state_dict())
    optimizer = build_optimizer(net, "adamw", lr=0.1, weight_decay=0.1)
    net(torch.randn(5, 3, 6, 6)).sum().backward()
    optimizer.step()
    kept = {name for name, value in net.state_dict().items() if torch.equal(value, before[name])}
    assert {name[0] for name in kept} == {"0", "1", "2"}
    assert set_frozen(net, names, False)
    assert all(part.training for part in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("freeze", ["backbone", "stages:2"])
def test_a_layer_whose_scale_the_net_fixes_is_frozen_too(freeze: str) -> None:
    net = speednet(4, 12)
    frozen, images = frozen_parameters(net, "speednet", freeze), torch.randn(4, 3, 12, 12)
    trained = {name for name, each in net.named_parameters() if each.requires_grad}
    norms = {name: part for name, part in net.named_modules() if isinstance(part, nn.BatchNorm2d)}
    layers_of = {name.rpartition(".")[0] for name in frozen}
    assert set_frozen(net, frozen, True)
    assert {name for name, part in norms.items() if not part.training} == layers_of & set(norms)
    assert (layers_of >= set(norms)) == (freeze == "backbone")
    assert net.head.training
    before = copy.deepcopy(net.state_dict())
    net(images)
    changed = {
        key for key, value in net.state_dict().items() if not torch.equal(value, before[key])
    }
    assert {key.rpartition(".")[0] for key in changed} == set(norms) - layers_of
    assert set_frozen(net, frozen, False)
    assert all(part.training for part in net.modules())
    assert {name for name, each in net.named_parameters() if each.requires_grad} == trained


def test_the_line_of_rates() -> None:
    net = resnet()
    assert rates_line(net, 0.001, 1.0, 1.0, [], None) == (
        "parameters and peak learning rates: head 2,052 at 0.001; layers before it 11,176,512 at "
        "0.001"
    )
    frozen = frozen_parameters(net, "resnet18", "stages:2")
    assert rates_line(net, 0.001, 0.5, 10.0, frozen, 3) == (
        "parameters and peak learning rates: head 2,052 at 0.01; layers before it 11,019,008 at "
        "1.56e-05 to 0.0005; 157,504 frozen until epoch 3, then at 1e-05"
    )


@pytest.mark.parametrize("freeze", ["", "stages:", "stages:-1", "stages:\0", "\0one", "backbones"])
def test_a_checkpoint_may_hold_any_setting(freeze: str) -> None:
    with pytest.raises(ConfigError, match="must be none, backbone or stages:N"):
        frozen_parameters(resnet(), "resnet18", freeze)
