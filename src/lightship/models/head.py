"""The last layer of a net, and the features that it gets."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightship.errors import ConfigError
from lightship.models.nets.structure import head_parameters

_TOLERANCE = 0.03  # of the largest logit; bfloat16 has 8 bits


class Head:
    """A net's last layer: a Linear or 1x1 Conv2d whose output, pooled if need be, are the logits.

    Or several such layers, the mean of whose outputs are the logits, as of DeiT's distilled nets
    (Touvron et al. 2021, arXiv 2012.12877). The features are then what all of them get.

    Args:
        net: The net.
        name: Its name, for the error.
        flag: The setting that needs it, likewise.

    Attributes:
        layers: The last layer, or the several.

    Raises:
        ConfigError: The net has no such layer.
    """

    def __init__(self, net: nn.Module, name: str, flag: str) -> None:
        self.net, self._name, self._flag = net, name, flag
        self.layers = _last_layers(net)
        if not has_linear_head(net):
            kinds = ", ".join(sorted(type(layer).__name__ for layer in self.layers)) or "nothing"
            raise self._refusal(f"its head is {kinds}")

    @property
    def width(self) -> int:
        """D, the number of features."""
        return sum(self._widths)

    @property
    def _widths(self) -> list[int]:
        return [layer.weight.shape[1] for layer in self.layers]

    def parameters(self) -> list[nn.Parameter]:
        """Those of the layers."""
        return [each for layer in self.layers for each in layer.parameters()]

    def features(self, pixels: Tensor) -> Tensor:
        """What the layer gets, averaged over places, [B, D] float32.

        Args:
            pixels: Images as the net takes them.
        """
        got: dict[nn.Module, Tensor] = {}
        handles = [
            layer.register_forward_pre_hook(lambda layer, args: got.update({layer: args[0]}))
            for layer in self.layers
        ]
        try:
            self.net(pixels)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat([self._pooled(layer, got[layer]) for layer in self.layers], dim=1)

    def _pooled(self, layer: nn.Module, values: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d) and values.ndim == 4:
            values = values.flatten(2).mean(2)
        if values.ndim != 2:
            raise self._refusal(f"its head gets {list(values.shape)}")
        return values.float()

    def logits(self, features: Tensor) -> Tensor:
        """Logits [B, C] of features [B, D]."""
        parts = features.to(self.layers[0].weight.dtype).split(self._widths, dim=1)
        outputs = [_output(layer, part) for layer, part in zip(self.layers, parts, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.stack(outputs).mean(0)

    @torch.no_grad()
    def check(self, pixels: Tensor) -> None:
        """Raise ConfigError unless the layer is the net's last operation. Restores its weights.

        Args:
            pixels: Some images; the net is in evaluation mode.
        """
        kept = [each.detach().clone() for each in self.parameters()]
        generator = torch.Generator().manual_seed(0)
        try:
            for each in self.parameters():  # zeros would hide what comes after it
                each.copy_(torch.randn(each.shape, generator=generator))
            expected = self.net(pixels).float()
            found = self.logits(self.features(pixels)).float()
        finally:
            for each, was in zip(self.parameters(), kept, strict=True):
                each.copy_(was)
        if float((found - expected).abs().max()) > _TOLERANCE * float(expected.abs().max()):
            raise self._refusal(f"something follows its last {type(self.layers[-1]).__name__}")

    @torch.no_grad()
    def set(self, weight: Tensor, bias: Tensor) -> None:
        """Set the layer's weights, [C, D] and [C]: the logits are those of one such layer."""
        for layer, part in zip(self.layers, weight.split(self._widths, dim=1), strict=True):
            assert layer.bias is not None, "refused at the start"
            layer.weight.copy_(len(self.layers) * part.reshape(layer.weight.shape))
            layer.bias.copy_(bias)

    def _refusal(self, reason: str) -> ConfigError:
        return ConfigError(
            f"{self._flag} needs a net that ends with one Linear or 1x1 Conv2d layer with a bias; "
            f"--model.net {self._name} does not: {reason}"
        )


def _output(layer: nn.Module, features: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return layer(features[:, :, None, None]).flatten(1)
    return layer(features)


def has_linear_head(net: nn.Module) -> bool:
    """Whether a net seems to have a `Head`, by its modules alone: it need not have memory."""
    layers = _last_layers(net)
    return bool(layers) and all(map(_is_linear, layers))


def _last_layers(net: nn.Module) -> list[Any]:
    """The modules of the head's parameters, in the net's order."""
    owners = dict.fromkeys(key.rpartition(".")[0] for key in head_parameters(net))
    return [net.get_submodule(owner) for owner in owners]


def _is_linear(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.groups == 1 and layer.bias is not None
    return isinstance(layer, nn.Linear) and layer.bias is not None


@contextmanager
def evaluation_mode(net: nn.Module) -> Iterator[None]:
    """A net in evaluation mode, without gradients and eager; its modules' modes are restored.

    Eager, since a compiled net would be recompiled for these shapes.
    """
    modes = {part: part.training for part in net.modules()}
    net.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for part, was_training in modes.items():
            part.training = was_training
