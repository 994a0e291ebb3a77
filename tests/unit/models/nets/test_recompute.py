"""Gradient checkpointing: fewer tensors kept, the same gradients and statistics."""

import copy

import pytest
import torch
from torch import nn

from lightship.errors import ConfigError
from lightship.models.nets.build import build_net
from lightship.models.nets.recompute import recompute_blocks


def one_step(net: nn.Module, images: torch.Tensor) -> tuple[int, list[torch.Tensor]]:
    """(bytes kept for the backward pass; gradients and buffers after one step)."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = net(images).square().mean()
    loss.backward()
    return sum(kept.values()), [
        *(each.grad.clone() for each in net.parameters() if each.grad is not None),
        *(each.clone() for each in net.buffers()),
    ]


@pytest.mark.parametrize("name", ["resnet18", "timm:test_vit", "timm:test_efficientnet"])
def test_the_same_gradients_and_statistics_with_less_memory(name: str) -> None:
    torch.manual_seed(0)
    plain = build_net(name, 3, 64, dropout=None, drop_path=None if name == "resnet18" else 0.3)
    recomputed = copy.deepcopy(plain)
    recompute_blocks(recomputed, name)
    images = torch.rand(4, 3, 64, 64)
    size, expected = one_step(plain, images)
    less, found = one_step(recomputed, images)
    assert less < 0.8 * size
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert plain.state_dict().keys() == recomputed.state_dict().keys()


def test_a_copy_computes_with_its_own_weights() -> None:
    net = build_net("resnet18", 3, 32)
    recompute_blocks(net, "resnet18")
    copied = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert copied.train()(torch.rand(2, 3, 32, 32)).abs().sum() > 0


def test_a_net_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"litcnn has no torch\.nn\.Sequential of blocks"):
        recompute_blocks(build_net("litcnn", 3, 32), "litcnn")
