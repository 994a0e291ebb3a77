"""Which module of a net gives its logits, found by running the net."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_NOTED = "lightship_last_layer"
"""Attribute of a net: names of its last layer's parameters."""


class Calls:
    """The modules of a net that ran in a forward pass.

    Args:
        num_classes: Width of the logits.

    Attributes:
        outputs: The modules in the order in which they ended, each with its last output if that
            has the width of the logits, else None.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.outputs: dict[nn.Module, Tensor | None] = {}

    def add(self, part: nn.Module, _: Any, output: Any) -> None:
        """A forward hook."""
        self.outputs.pop(part, None)
        self.outputs[part] = output if _has_width(output, self.num_classes) else None


@contextmanager
def noted_calls(net: nn.Module, num_classes: int) -> Iterator[Calls]:
    """The calls of a net's modules within this block; those of TorchScript cannot be seen."""
    calls = Calls(num_classes)
    seen = [part for part in net.modules() if not isinstance(part, torch.jit.ScriptModule)]
    handles = [part.register_forward_hook(calls.add) for part in seen]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def note_last_layer(net: nn.Module, calls: Calls, logits: Tensor) -> None:
    """Find the module that gave the logits, for `noted`.

    It is the last one that ran and has weights and an output of one value a class; of modules in
    each other, the innermost. A module that did not run (its weights are used by the one around it,
    as in a cosine head) counts as a part of that one.

    Args:
        net: The net.
        calls: Of the pass.
        logits: Its result, [B, C].
    """
    width, weights = calls.num_classes, _weights_by_user(net, calls)
    found = {
        part: output
        for part, output in calls.outputs.items()
        if output is not None
        and any(each.ndim > 1 and width in each.shape for each in weights[part])
    }
    inner = [part for part in found if not any(other in found for other in _inside(part))]
    results = [part for part in inner if _equal(found[part], logits)]
    names: list[str] = []
    for chosen in (results or inner)[-1:]:
        others = any(weights.get(other) for other in _inside(chosen))
        own = {id(each) for each in weights[chosen] if not others or width in each.shape}
        names = [name for name, each in net.named_parameters() if id(each) in own]
    setattr(net, _NOTED, names)


def noted(net: nn.Module) -> list[str] | None:
    """Names of the last layer's parameters; empty: it has none; None: the net was not run."""
    return vars(net).get(_NOTED)


def _weights_by_user(net: nn.Module, calls: Calls) -> dict[nn.Module, list[nn.Parameter]]:
    """Parameters by the innermost module around them that ran; of a tied one by each."""
    parts = dict(net.named_modules(remove_duplicate=False))
    found: dict[nn.Module, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in net.named_parameters(remove_duplicate=False):
        # What makes a weight of others (torch.nn.utils.parametrize) runs, but is no layer.
        owner, _, made_of = name.partition(".parametrizations.")
        owner = owner if made_of else name.rpartition(".")[0]
        while owner and parts[owner] not in calls.outputs:
            owner = owner.rpartition(".")[0]
        found[parts[owner]].append(parameter)
    return found


def _inside(part: nn.Module) -> list[nn.Module]:
    return [other for other in part.modules() if other is not part]


def _has_width(output: Any, width: int) -> bool:
    return (
        isinstance(output, Tensor)
        and output.ndim > 1
        and width in (output.shape[1], output.shape[-1])
    )


def _equal(output: Tensor, logits: Tensor) -> bool:
    return output.shape == logits.shape and torch.equal(output, logits)
