"""The last layer of a net, whatever the order in which it registers its modules."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from lightship.errors import ConfigError
from lightship.models.finetune import frozen_parameters, lr_scales, rates_line, set_frozen
from lightship.models.head import Head
from lightship.models.nets.build import _check_output, build_net
from lightship.models.nets.structure import head_parameters, layers

CLASSES, WIDTH, SIZE_PX = 4, 6, 8


class _Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, WIDTH, 3), nn.Linear(WIDTH, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        return self.mix(self.conv(images).relu().mean((2, 3))).relu()


class _HeadFirst(nn.Module):
    """Registers its last layer before its body."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.fc, self.body = head, _Body()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(images)) * self.temperature


class _Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = (
            nn.Parameter(torch.randn(CLASSES, WIDTH)),
            nn.Parameter(torch.ones(1)),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))


class _CosineOfLinear(nn.Module):
    """Uses the weights of a Linear that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize(features), F.normalize(self.fc.weight))


class _OwnWeight(nn.Module):
    """Holds the weights of its last layer itself, beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, WIDTH))
        self.centers, self.body = nn.Parameter(torch.randn(WIDTH, CLASSES)), _Body()

    def forward(self, images: Tensor) -> Tensor:
        return (self.body(images) + self.token) @ self.centers


class _Tied(nn.Module):
    """Its first and its last layer have the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = nn.Conv2d(3, CLASSES, 1, bias=False), nn.Linear(CLASSES, 3)
        self.last = nn.Conv2d(3, CLASSES, 1)
        self.last.weight = self.first.weight

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(self.first(images).mean((2, 3)))
        return self.last(features[:, :, None, None]).flatten(1)


class _Nearest(nn.Module):
    """Gives minus the distances to fixed points: no weights in its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _Body()
        self.register_buffer("points", torch.randn(CLASSES, WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        return -torch.cdist(self.body(images), self.points)


NETS = {
    "Linear": (lambda: _HeadFirst(nn.Linear(WIDTH, CLASSES)), ["fc.weight", "fc.bias"]),
    "cosine": (lambda: _HeadFirst(_Cosine()), ["fc.weight", "fc.scale"]),
    "cosine of a Linear": (lambda: _HeadFirst(_CosineOfLinear()), ["fc.fc.weight"]),
    "with BatchNorm behind it": (
        lambda: _HeadFirst(nn.Sequential(nn.Linear(WIDTH, CLASSES), nn.BatchNorm1d(CLASSES))),
        ["fc.0.weight", "fc.0.bias"],
    ),
    "weight norm": (
        lambda: _HeadFirst(weight_norm(nn.Linear(WIDTH, CLASSES))),
        [
            "fc.bias",
            "fc.parametrizations.weight.original0",
            "fc.parametrizations.weight.original1",
        ],
    ),
    "of the net itself": (_OwnWeight, ["centers"]),
    "of two layers": (
        lambda: _HeadFirst(
            nn.Sequential(nn.Linear(WIDTH, CLASSES), nn.ReLU(), nn.Linear(CLASSES, CLASSES))
        ),
        ["fc.2.weight", "fc.2.bias"],
    ),
    "tied": (_Tied, ["first.weight", "last.bias"]),
}


def checked(net: nn.Module) -> nn.Module:
    _check_output(net, "own", CLASSES, SIZE_PX)
    return net


@pytest.mark.parametrize("name", NETS)
def test_the_head_is_what_gives_the_logits(name: str) -> None:
    make, expected = NETS[name]
    net = checked(make())
    assert head_parameters(net) == expected
    assert not any(part._forward_hooks for part in net.modules())
    for coarse in (False, True):
        found = layers(net, coarse)
        names = [parameter for layer in found for parameter in layer.parameters]
        assert sorted(names) == sorted(key for key, _ in net.named_parameters())
        assert found[-1].parameters == expected
    frozen = set(frozen_parameters(net, "own", "backbone"))
    assert frozen == {key for key, _ in net.named_parameters()} - set(expected)
    scales = lr_scales(net, 0.5, 3.0)
    assert {key for key, scale in scales.items() if scale == 3.0} == set(expected)
    set_frozen(net, frozen, True)
    set_frozen(net, frozen, False)
    assert all(part.training for part in net.modules())


def test_head_init_takes_the_layer_that_gives_the_logits() -> None:
    net = checked(_HeadFirst(nn.Linear(WIDTH, CLASSES)))
    assert Head(net, "own", "--model.head_init features").layers == [net.fc]


def test_what_needs_a_last_layer_is_refused_without_one() -> None:
    net = checked(_Nearest())
    assert head_parameters(net) == []
    for freeze in ("backbone", "stages:1"):
        with pytest.raises(ConfigError, match=f"--model.freeze {freeze} needs a last layer"):
            frozen_parameters(net, "own", freeze)
    for rates in ((0.5, 1.0), (1.0, 2.0)):
        with pytest.raises(ConfigError, match=r"--optim\.layer_decay .* such as nn.Linear"):
            lr_scales(net, *rates)
    with pytest.raises(ConfigError, match=r"--model\.head_init features needs a net that ends"):
        Head(net, "own", "--model.head_init features")
    assert frozen_parameters(net, "own", "none") == []
    assert "rates: all 210 at 0.1" in rates_line(net, 0.1, 1.0, 1.0, [], None)


@pytest.mark.parametrize(
    ("name", "size_px"),
    [
        ("litcnn", 28), ("speednet", 32), ("squeezenet1_1", 64), ("mnasnet0_5", 64),
        ("shufflenet_v2_x0_5", 64), ("swin_t", 64), ("alexnet", 64),
    ],
)  # fmt: skip
def test_of_a_published_net_it_is_the_last_one_registered(name: str, size_px: int) -> None:
    net = build_net(name, 5, size_px)
    kinds = (nn.Linear, nn.Conv2d)
    last = [part for part in net.modules() if isinstance(part, kinds)][-1]
    found = [net.get_parameter(each) for each in head_parameters(net)]
    assert [id(each) for each in found] == [id(each) for each in last.parameters()]
