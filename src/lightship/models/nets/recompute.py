"""Gradient checkpointing: less memory for activations, a second forward pass of each block."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from lightship.errors import ConfigError


def recompute_blocks(net: nn.Module, name: str) -> None:
    """Have training keep the inputs of a net's blocks only (Chen et al. 2016, arXiv 1604.06174).

    The backward pass computes each block again, with the same random numbers; gradients and
    BatchNorm's statistics are the same as without.

    Args:
        net: The net; its blocks are changed in place, names and weights stay.
        name: Its name, for the error.

    Raises:
        ConfigError: It is not built of blocks one after the other.
    """
    blocks = list(_blocks(net))
    if not blocks:
        raise ConfigError(
            f"--model.grad_checkpointing true: {name} has no torch.nn.Sequential of blocks; use "
            "--trainer.accumulate_grad_batches for less memory"
        )
    for block in blocks:
        block.forward = functools.partial(_forward, block)


def _blocks(part: nn.Module) -> Iterator[nn.Module]:
    """The members, with several layers each, of the outermost sequences of a net."""
    for child in part.children():
        if isinstance(child, nn.Sequential):
            yield from (each for each in child if len(_layers(each)) > 1)
        else:
            yield from _blocks(child)


def _layers(part: nn.Module) -> list[nn.Module]:
    return [each for each in part.modules() if each._parameters]


def _forward(block: nn.Module, *inputs: Any) -> Any:
    plain = type(block).forward
    if not (block.training and torch.is_grad_enabled()):
        return plain(block, *inputs)
    contexts = functools.partial(_contexts, block)
    return checkpoint(plain, block, *inputs, use_reentrant=False, context_fn=contexts)


def _contexts(block: nn.Module) -> tuple[Any, Any]:
    return nullcontext(), _statistics_kept(block)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """The second pass must not count a batch again."""
    norms = [part for part in block.modules() if isinstance(part, _BatchNorm)]
    momentums = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momentums, strict=True):
            norm.momentum = momentum
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)
