"""Dropout and stochastic depth that are set from outside."""

import pytest
from torch import nn
from torchvision.ops import StochasticDepth

from lightship.errors import ConfigError
from lightship.models.nets.build import build_net


def test_torchvisions_branches_are_dropped_more_and_more() -> None:
    net = build_net("convnext_tiny", 3, 32, dropout=None, drop_path=0.4)
    shares = [part.p for part in net.modules() if isinstance(part, StochasticDepth)]
    assert shares[0] == 0
    assert shares[-1] == 0.4
    assert shares == sorted(shares)


def test_timms_nets_are_built_with_both() -> None:
    net = build_net("timm:test_vit", 3, 64, dropout=0.25, drop_path=0.5)
    drops = [part.drop_prob for part in net.modules() if type(part).__name__ == "DropPath"]
    assert max(drops) == 0.5
    assert any(isinstance(part, nn.Dropout) and part.p == 0.25 for part in net.modules())


def test_every_dropout_layer_is_set_and_zero_turns_it_off() -> None:
    net = build_net("mobilenet_v3_small", 3, 32, dropout=0.0)
    assert {part.p for part in net.modules() if isinstance(part, nn.Dropout)} == {0.0}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet18", {"dropout": 0.1}, r"--model\.dropout 0\.1: resnet18 has no dropout"),
        ("resnet18", {"drop_path": 0.1}, r"--model\.drop_path 0\.1: resnet18 has no residual"),
        ("litcnn", {"dropout": 0.1}, r"--model\.dropout 0\.1: litcnn"),
        ("timm:test_vit", {"drop_path": 0.1, "dropout": None}, None),
        ("timm:vgg11", {"drop_path": 0.1}, r"timm:vgg11 has no"),
    ],
)
def test_what_a_net_does_not_have_is_refused(name, options, words: str | None) -> None:
    if words is None:
        build_net(name, 3, 64, **options)
        return
    with pytest.raises(ConfigError, match=words):
        build_net(name, 3, 64, **options)
