"""speednet: its first layer whitens, its convolutions begin as the identity, and it learns."""

import copy

import pytest
import torch
from torch import nn

from lightship.errors import ConfigError
from lightship.models.nets.build import build_net
from lightship.models.nets.speednet import SpeedNet, speednet, speednet96
from tests.support import little_fit


def textured(count: int, size_px: int = 12) -> torch.Tensor:
    """Images whose neighbouring pixels and channels are alike, as in photographs."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(count, 3, size_px + 4, size_px + 4, generator=generator)
    smooth = nn.functional.avg_pool2d(noise, 5, stride=1) * 5
    return smooth + 0.6 * smooth.mean(1, keepdim=True) + 0.05 * noise[..., 2:-2, 2:-2]


def test_the_first_layer_whitens_patches() -> None:
    net, images = speednet(10, 12), textured(600)
    net.init_from_images(images)
    with torch.no_grad():
        seen = nn.functional.conv2d(images, net.whiten.weight)
    outputs = seen.transpose(0, 1).flatten(1)
    second = (outputs @ outputs.T / outputs.shape[1])[:12, :12]
    variances = second.diagonal()
    # eps pulls directions that hardly vary below 1, never above.
    assert variances.max() < 1.001
    assert variances[-6:].min() > 0.95
    assert (second - torch.diag(variances)).abs().max() < 1e-3
    assert torch.equal(outputs[12:], -outputs[:12])
    patches = nn.functional.unfold(images, 2).transpose(1, 2).flatten(0, 1)
    plain = patches.T @ patches / len(patches)
    assert (plain - torch.diag(plain.diagonal())).abs().max() > 0.3, "they were correlated"


def test_whitening_is_a_function_of_the_images_and_lies_in_the_state() -> None:
    images = textured(300)
    one, other = speednet(10, 12), speednet(10, 12)
    assert not torch.equal(one.head.weight, other.head.weight)
    one.init_from_images(images)
    other.init_from_images(images)
    assert torch.equal(one.whiten.weight, other.whiten.weight)
    again = speednet(10, 12)
    again.load_state_dict(one.state_dict())
    again.eval()
    assert torch.equal(again(images[:4]), one.eval()(images[:4]))
    trained = {name for name, p in one.named_parameters() if p.requires_grad}
    assert trained == {
        "whiten.bias", "head.weight",
        *(f"groups.{g}.convs.{c}.weight" for g in range(3) for c in range(2)),
        *(f"groups.{g}.norms.{c}.bias" for g in range(3) for c in range(2)),
    }  # fmt: skip


def test_convolutions_begin_as_the_identity() -> None:
    net = speednet(10, 32)
    channels = torch.randn(2, 64, 16, 16)
    assert torch.equal(net.groups[1].convs[0](channels)[:, :64], channels)
    assert net.head.weight.std().item() == pytest.approx(1, abs=1e-5)


def test_sizes() -> None:
    assert sum(p.numel() for p in speednet(10, 32).parameters()) == 1_972_792  # airbench94_muon's
    for size_px in (9, 16, 32, 40):
        build_net("speednet", 7, size_px)
    with pytest.raises(ConfigError, match=r"speednet96 needs images of at least 9 px, not 8"):
        speednet96(10, 8)


def test_three_convolutions_are_a_residual_group() -> None:
    net = speednet96(10, 9)
    group = net.groups[0].eval()
    with torch.no_grad():
        for conv in group.convs[1:]:
            conv.weight.zero_()
        images = torch.randn(2, 24, 8, 8)
        first = nn.functional.max_pool2d(group.convs[0](images), 2) / (1 + 1e-12) ** 0.5
        expected = nn.functional.gelu(nn.functional.gelu(first))
        torch.testing.assert_close(group(images), expected)


def steps(net: SpeedNet, count: int, trains_whitening: bool) -> dict[str, torch.Tensor]:
    net.trains_whitening = trains_whitening
    for seed in range(count):
        batch = little_fit.batch_of(seed)
        net.zero_grad()
        loss = nn.functional.cross_entropy(net(batch.images.float() / 255), batch.labels)
        loss.backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def test_a_still_whitening_bias_changes_no_other_gradient() -> None:
    net = speednet(3, 16)
    moving, still = (steps(copy.deepcopy(net), 2, trains) for trains in (True, False))
    assert moving.keys() == still.keys(), "DDP waits for a gradient of each"
    assert moving["whiten.bias"].abs().max() > 0
    assert still["whiten.bias"].abs().max() == 0
    for name in moving.keys() - {"whiten.bias"}:
        assert torch.equal(moving[name], still[name])


def test_the_bias_is_told_to_rest_by_the_epoch_alone() -> None:
    told = []

    class Watch(little_fit.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            told.append((trainer.current_epoch, pl_module.net.trains_whitening))

    settings = {"name": "muon-sgd", "lr": 0.1, "whitening_fraction": 0.4}
    model = little_fit.classifier(net="speednet", optim=settings)
    little_fit.fit([Watch()], max_epochs=4, model=model)
    # 6.4 of 16 steps: the second epoch, which it ends in, is still moved; the third is not.
    assert told == [(epoch, epoch < 2) for epoch in range(4) for _ in range(4)]
