"""Depthwise convolutions in float32 on a CPU: in bfloat16 their backward pass is slow there."""

import torch
from torch import Tensor, nn


def in_float32_on_cpu(net: nn.Module) -> None:
    """Have the depthwise convolutions of a net compute in float32 under a CPU's autocast.

    oneDNN has no bfloat16 kernel for the gradient of strided depthwise convolutions, nor for that
    of 5x5 filters, and its reference code takes most of a step: of tf_efficientnet_lite0 at 160 px
    63 %. Parameters, their names and every other device and precision are as before.

    Args:
        net: Is changed in place.
    """
    for module in net.modules():
        if not isinstance(module, nn.Conv2d) or isinstance(module, _Float32OnCPU):
            continue
        if 1 < module.groups == module.in_channels:
            kind = type(module)  # also timm's Conv2dSame
            module.__class__ = type(kind.__name__, (_Float32OnCPU, kind), {})


class _Float32OnCPU(nn.Conv2d):
    """Goes before the class of a convolution."""

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of `input` [B, C, H, W], in autocast's dtype if that is on."""
        if input.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            output = super().forward(input.float())
        return output.to(torch.get_autocast_dtype("cpu"))
