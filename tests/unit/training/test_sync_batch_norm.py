"""Synchronized BatchNorm: the same net during and after a fit, and its layers are torch's.

What torch computes over several ranks needs GPUs.
"""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import nn

from lightship.errors import ConfigError
from lightship.models.finetune import batch_norms
from lightship.models.nets import build
from lightship.training.callbacks.batch_norm import PreciseBatchNorm
from lightship.training.sync_batch_norm import SyncBatchNorm, without_sync
from tests.support import little_fit

NETS = ["timm:tf_efficientnet_lite0", "resnet18", "speednet"]


def net_of(name: str) -> nn.Module:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    return build.build_net(name, 4, 32)


def kinds(net: nn.Module) -> list[type]:
    return [type(part) for part in net.modules()]


@pytest.mark.parametrize("name", NETS)
def test_the_net_computes_the_same_synchronized_and_after_it(name: str, monkeypatch) -> None:
    net, images = net_of(name), torch.randn(4, 3, 32, 32)
    own, names = kinds(net), list(net.state_dict())
    plain = copy.deepcopy(net)
    calls: list[nn.Module] = []
    forward = nn.SyncBatchNorm.forward

    def noted(self: nn.SyncBatchNorm, x: torch.Tensor) -> torch.Tensor:
        calls.append(self)
        return forward(self, x)

    monkeypatch.setattr(nn.SyncBatchNorm, "forward", noted)
    for mode in (False, True):
        expected = plain.train(mode)(images)
        synchronized = SyncBatchNorm().apply(net)
        assert all(isinstance(part, nn.SyncBatchNorm) for part in batch_norms(net))
        assert torch.equal(synchronized.train(mode)(images), expected)
        assert set(calls) == set(batch_norms(net))
        assert SyncBatchNorm().revert(synchronized) is net
        assert kinds(net) == own
        assert torch.equal(net(images), plain(images))
    assert list(net.state_dict()) == names
    for key, value in net.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key


class Doubled(nn.BatchNorm2d):
    """A layer of a user, with more in its forward pass."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_a_forward_pass_of_its_own_is_refused() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), Doubled(3))
    with pytest.raises(ConfigError, match=r"sync_batchnorm true: .*\.Doubled, whose forward pass"):
        SyncBatchNorm().apply(net)
    assert kinds(net) == [nn.Sequential, nn.BatchNorm2d, Doubled]


def test_layers_that_the_net_itself_synchronizes_stay_so() -> None:
    net = nn.Sequential(nn.SyncBatchNorm(3), nn.BatchNorm1d(3))
    SyncBatchNorm().apply(net)
    with without_sync(net):
        assert kinds(net)[1:] == [nn.SyncBatchNorm, nn.BatchNorm1d]
    assert isinstance(net[1], nn.SyncBatchNorm)
    SyncBatchNorm().revert(net)
    assert kinds(net)[1:] == [nn.SyncBatchNorm, nn.BatchNorm1d]


def test_precise_statistics_are_computed_without_the_other_ranks(monkeypatch) -> None:
    """A rank leaves out a batch of unreadable images, where the others would wait for it."""
    model: Any = SyncBatchNorm().apply(little_fit.classifier(net="tests.support.own_nets:moody"))
    loader = [little_fit.batch_of(0)]
    data = SimpleNamespace(
        prepare=lambda _: SimpleNamespace(spread=lambda _: np.arange(8)),
        listed_dataloader=lambda *_: loader,
    )
    trainer: Any = SimpleNamespace(
        global_step=1, current_epoch=0, world_size=1, global_rank=0, datamodule=data,
        max_steps=1, precision_plugin=Precision(),
    )  # fmt: skip

    def waits(*_: Any) -> None:
        raise AssertionError("waits for the other ranks")

    callback = PreciseBatchNorm(None)
    callback.on_train_epoch_start(trainer, model)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", waits)
    callback.on_train_epoch_end(trainer, model)
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(isinstance(part, nn.SyncBatchNorm) for part in batch_norms(model.net))
