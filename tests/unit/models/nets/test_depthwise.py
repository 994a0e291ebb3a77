"""Depthwise convolutions under a CPU's autocast."""

import copy

import pytest
import torch
from torch import nn

from lightship.models.nets.depthwise import in_float32_on_cpu


class Padded(nn.Conv2d):
    """As timm's Conv2dSame: pads, then convolves."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))


def test_gradients_are_those_of_float32_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(Padded(8, 8, 5, stride=2, groups=8), nn.Conv2d(8, 4, 1))
    net = copy.deepcopy(plain)
    in_float32_on_cpu(net)
    in_float32_on_cpu(net)  # twice is as good as once
    assert isinstance(net[0], Padded)
    assert type(net[1]) is nn.Conv2d
    assert net.state_dict().keys() == plain.state_dict().keys()

    images = torch.randn(3, 8, 9, 9)
    assert torch.equal(net(images), plain(images))
    with torch.autocast("cpu", torch.bfloat16):
        found = net[0](images)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, plain[0](images).bfloat16())

    found.float().square().sum().backward()
    # The gradient that arrives is rounded, as every activation; the convolution's own is not.
    plain[0](images).backward((2 * found.detach().float()).bfloat16().float())
    assert torch.equal(net[0].weight.grad, plain[0].weight.grad)


def test_a_copy_has_its_own_weights() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    in_float32_on_cpu(net)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight.zero_()
        other[0].bias.zero_()
    images = torch.randn(1, 4, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert not other(images).any()
        assert net(images).any()


@pytest.mark.parametrize("groups", [1, 2])
def test_other_convolutions_are_left_alone(groups: int) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=groups))
    in_float32_on_cpu(net)
    assert type(net[0]) is nn.Conv2d
