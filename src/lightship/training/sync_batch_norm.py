"""BatchNorm over the batches of all ranks, in place of Lightning's and torch's conversion."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.plugins import LayerSync
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightship.errors import ConfigError
from lightship.models.nets import timm_nets


class SyncBatchNorm(LayerSync):
    """Gives BatchNorm layers a synchronized class during a fit, and their own class after it.

    torch's conversion puts new layers in their place, without what a subclass adds (timm's
    activation); Lightning's way back puts new ones in place of those. Here a layer stays the same
    object, with its parameters, children, hooks and mode.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronize the layers.

        Raises:
            ConfigError: A layer's forward pass is one that cannot be synchronized.
        """
        found = [part for part in model.modules() if isinstance(part, _BatchNorm)]
        layers = [part for part in found if not isinstance(part, nn.SyncBatchNorm)]
        kinds = {kind: _synchronized(kind) for kind in map(type, layers)}
        for part in layers:
            part.__class__ = kinds[type(part)]
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Undo `apply`."""
        for part in model.modules():
            if isinstance(part, _Synchronized):
                part.__class__ = part.original
        return model


@contextmanager
def without_sync(model: nn.Module) -> Iterator[None]:
    """Let each rank use the statistics of its own batches: ranks may differ in their number."""
    layers = [(part, type(part)) for part in model.modules() if isinstance(part, _Synchronized)]
    SyncBatchNorm().revert(model)
    try:
        yield
    finally:
        for part, kind in layers:
            part.__class__ = kind


class _Synchronized:
    """First base of the classes that `SyncBatchNorm` gives."""

    original: Any
    process_group = None  # all ranks; torch sets it in a constructor, which does not run here


def _synchronized(kind: Any) -> Any:
    """A class with `kind`'s methods whose forward pass is synchronized."""
    if kind.forward is _BatchNorm.forward:
        bases: tuple[type, ...] = (kind, nn.SyncBatchNorm)
    elif (of_timm := timm_nets.synchronized_norm(kind)) is not None:
        bases = (of_timm, kind)
    else:
        raise ConfigError(
            f"--trainer.sync_batchnorm true: the net has layers of {kind.__module__}."
            f"{kind.__qualname__}, whose forward pass torch cannot synchronize; set it to false"
        )
    return type(f"Sync{kind.__name__}", (_Synchronized, *bases), {"original": kind})
