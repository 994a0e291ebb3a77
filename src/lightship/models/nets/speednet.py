"""speednet: the small convolutional nets of the CIFAR-10 speed records, for small images.

The design is that of airbench94_muon and airbench96 (Keller Jordan 2024, arXiv:2404.00498,
https://github.com/KellerJordan/cifar10-airbench), which descend from hlb-CIFAR10 (Tysam Balsam) and
myrtle.ai's ResNets (David Page): a whitening first layer computed from the data, convolutions
initialized as the identity, BatchNorm with frozen scales, and a classifier with scaled output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightship.errors import ConfigError

_PATCH_PX = 2
_SMALLEST_PX = 9
"""Whitening removes one pixel; three halvings turn eight into one."""
_WHITENING_EPS = 5e-4
_IMAGES_AT_ONCE = 256


def speednet(num_classes: int, image_size_px: int) -> "SpeedNet":
    """The net of airbench94_muon: widths 64-256-256, two convolutions per group, 2.0 M parameters.

    Args:
        num_classes: Number of outputs.
        image_size_px: Side of the square images.

    Raises:
        ConfigError: The images are too small for the three halvings.
    """
    _check_size("speednet", image_size_px)
    return SpeedNet(num_classes, (64, 256, 256), depth=2, bn_momentum=0.4)


def speednet96(num_classes: int, image_size_px: int) -> "SpeedNet":
    """The net of airbench96: widths 128-512-512, three convolutions per group, two residual.

    The classifier is scaled as in `speednet`, so both use the same optimizer settings. Arguments
    and errors are those of `speednet`.
    """
    _check_size("speednet96", image_size_px)
    return SpeedNet(num_classes, (128, 512, 512), depth=3, bn_momentum=0.1)


def _check_size(name: str, image_size_px: int) -> None:
    if image_size_px < _SMALLEST_PX:
        raise ConfigError(
            f"--model.net {name} needs images of at least {_SMALLEST_PX} px, not {image_size_px}: "
            f"set --data.image_size_px {_SMALLEST_PX} or more"
        )


class SpeedNet(nn.Module):
    """From normalized float [B, 3, S, S] to logits [B, num_classes].

    Args:
        num_classes: Number of outputs.
        widths: Channels of the three groups.
        depth: Convolutions per group, 2 or 3; with 3 the last two are a residual branch.
        bn_momentum: Weight of a batch in BatchNorm's running statistics.

    Attributes:
        trains_whitening: Whether the whitening bias gets a gradient. When its learning rate is 0,
            it needs none, and the backward pass ends one layer earlier.
    """

    def __init__(
        self, num_classes: int, widths: tuple[int, int, int], depth: int, bn_momentum: float
    ) -> None:
        super().__init__()
        whitened = 2 * 3 * _PATCH_PX**2
        self.whiten = nn.Conv2d(3, whitened, _PATCH_PX)
        self.whiten.weight.requires_grad_(False)
        self.trains_whitening = True
        self.groups = nn.Sequential(
            *(
                ConvGroup(width_in, width, depth, bn_momentum)
                for width_in, width in zip((whitened, *widths[:-1]), widths, strict=True)
            )
        )
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        with torch.no_grad():
            self.head.weight /= self.head.weight.std()

    @torch.no_grad()
    def init_from_images(self, images: Tensor) -> None:
        """Make the first layer whiten 2x2 patches. Called once, before training.

        Its filters are the eigenvectors of the patches' second moments, scaled to an output of
        variance 1, and their negatives (Page 2019, "How to train your ResNet 8"; hlb-CIFAR10).

        Args:
            images: [N, 3, S, S] normalized training images, float32.
        """
        shape = self.whiten.weight.shape[1:]
        moments = torch.zeros(shape.numel(), shape.numel(), dtype=torch.float64)
        for some in images.split(_IMAGES_AT_ONCE):
            patches = F.unfold(some, _PATCH_PX).transpose(1, 2).flatten(0, 1).double()
            moments += patches.T @ patches
        count = len(images) * (images.shape[2] - _PATCH_PX + 1) * (images.shape[3] - _PATCH_PX + 1)
        variances, directions = torch.linalg.eigh(moments / count)
        filters = (directions / torch.sqrt(variances + _WHITENING_EPS)).T.reshape(-1, *shape)
        self.whiten.weight.copy_(torch.cat((filters, -filters)))

    def forward(self, images: Tensor) -> Tensor:
        """Classify images."""
        bias = self.whiten.bias
        assert bias is not None
        used = bias if self.trains_whitening else bias.detach()
        x = F.gelu(F.conv2d(images, self.whiten.weight, used))
        x = self.groups(x)
        x = F.max_pool2d(x, (x.shape[2], x.shape[3])).flatten(1)
        logits = self.head(x) / x.shape[1]
        if self.training and not self.trains_whitening:
            # A zero gradient: DDP waits for the gradient of every parameter.
            logits = logits + 0 * bias.sum()
        return logits


class ConvGroup(nn.Module):
    """A convolution that changes the width and halves the size, then one or two that keep both."""

    def __init__(self, width_in: int, width: int, depth: int, bn_momentum: float) -> None:
        super().__init__()
        widths_in = (width_in, *[width] * (depth - 1))
        self.convs = nn.ModuleList(_identity_conv(w, width) for w in widths_in)
        self.norms = nn.ModuleList(_shift_norm(width, bn_momentum) for _ in widths_in)
        self.is_residual = depth > 2

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, S, S] to [B, width, S // 2, S // 2]."""
        x = F.gelu(self.norms[0](F.max_pool2d(self.convs[0](x), 2)))
        branched = x
        for index in range(1, len(self.convs)):
            x = self.norms[index](self.convs[index](x))
            if self.is_residual and index == len(self.convs) - 1:
                x = x + branched
            x = F.gelu(x)
        return x


def _identity_conv(width_in: int, width: int) -> nn.Conv2d:
    """A 3x3 convolution whose first filters hand each channel on (Dirac) and whose others do not.

    Zagoruyko & Komodakis 2017, "DiracNets", arXiv:1706.00388.
    """
    conv = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(conv.weight[:width_in])
    return conv


def _shift_norm(width: int, momentum: float) -> nn.BatchNorm2d:
    """BatchNorm whose scale stays 1: the next filters' size would undo it anyway."""
    norm = nn.BatchNorm2d(width, eps=1e-12, momentum=momentum)
    norm.weight.requires_grad_(False)
    return norm
