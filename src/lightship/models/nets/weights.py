"""Initial weights: read from a file of any usual kind, and loaded into a net if they fit it."""

import itertools
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightship.checkpoint.loading import read_payload
from lightship.checkpoint.serialization import from_bytes
from lightship.data.names import normal_form
from lightship.errors import ConfigError, in_one_line
from lightship.models.nets import published, timm_nets
from lightship.models.nets.structure import head_parameters
from lightship.storage import redact

logger = logging.getLogger(__name__)
_NESTED = (
    "state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "module",
)  # fmt: skip
"""Keys under which training scripts store a state dict; averaged weights come first."""
_WRAPPERS = re.compile(r"((?:_orig_mod|module|model|net|backbone|state_dict|model_ema)\.){0,8}")
"""Prefixes of names: of modules that hold a net, and of wrappers (DDP, torch.compile).

Not more of them than anybody nests: each prefix of a forged name of megabytes would be a text.
"""
_NOT_WEIGHTS = re.compile(r"n_averaged|(.*\.)?total_(ops|params)")
_HEAD_STD = 0.01
_AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")
"""Of googlenet and inception_v3: in their published weights, but not built here."""
_COUNTER = "num_batches_tracked"
_TOLERANCE = 0.05
"""Share of names that may differ."""
_NAMED = 3
_MAX_PREFIXES = 32


class Weights(NamedTuple):
    """The content of a file of weights.

    Attributes:
        where: The setting, for messages.
        state: Name -> tensor, with the names of the file.
        hyper_parameters: Of a checkpoint of lightship, else empty.
    """

    where: str
    state: dict[str, Tensor]
    hyper_parameters: Mapping[str, Any]


def read_weights(net: str, weights: str) -> Weights:
    """The weights of `--model.weights`. Every rank; blocks. Runs no code in the file.

    Args:
        net: Name of the net, for `default`.
        weights: `default` (see `published.fetch`) or the URL of a PyTorch or safetensors file.

    Raises:
        ConfigError: The file holds no weights, or needs code to be unpickled.
    """
    if weights == "default":
        payload, url = published.fetch(net)
        return parse_weights(payload, f"--model.weights default ({redact(url)})")
    where = f"--model.weights {redact(weights)}"
    return parse_weights(read_payload(weights, where), where)


def parse_weights(payload: bytes, where: str) -> Weights:
    """The weights in a file, recognized by its content. Raises ConfigError."""
    content = _from_safetensors(payload, where)
    if content is None:
        content = from_bytes(payload, where)
    kept = content.get("hyper_parameters") if "lightship" in content else None
    state: Mapping[Any, Any] = content
    for _ in range(len(_NESTED)):
        inner = next((state[key] for key in _NESTED if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            break
        state = inner
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(str(key) for key in list(state)[:_NAMED]) or "nothing"
        raise ConfigError(f"{where} holds no state dict (names to tensors), but {keys}")
    return Weights(where, tensors, kept if isinstance(kept, Mapping) else {})


def _from_safetensors(payload: bytes, where: str) -> dict[str, Any] | None:
    """Its tensors; None for a file of another kind."""
    length = int.from_bytes(payload[:8], "little")
    if payload[8:9] != b"{" or length > len(payload):
        return None
    from safetensors.torch import load

    try:
        return load(payload)
    except Exception as error:  # also torch's, of types and shapes that it does not know
        reason = in_one_line(error)
        raise ConfigError(f"{where} cannot be read as a safetensors file ({reason})") from error


def load_weights(net: nn.Module, name: str, weights: Weights, class_names: Sequence[str]) -> None:
    """Copy weights into a net, in its dtype, and log what fits. Every rank.

    Where a tensor of the head differs in shape, or the head is of other classes, it is new: near
    zero if it gives the logits, so that the first steps do not drag the loaded layers after random
    predictions (as Kolesnikov et al. 2020, arXiv 1912.11370).

    Args:
        net: Of `build_net`.
        name: Its name, for messages.
        weights: Of `read_weights`.
        class_names: C names in label order; the rows of a lightship checkpoint's head are put into
            this order.

    Raises:
        ConfigError: They do not fit: a tensor other than the head's has another shape or kind, or
            more than a twentieth of either side's names are not the other's.
    """
    own = net.state_dict()
    head = _head_keys(net, own)
    state = _adapted(weights, name, net, own)
    if not any(key.endswith(_COUNTER) for key in state):  # files of before torch 0.4.1
        own = {key: value for key, value in own.items() if not key.endswith(_COUNTER)}
    for key in head:
        if key in state and key in own and state[key].shape != own[key].shape:
            del state[key]
    about_classes = _fit_classes(state, head, weights, class_names)
    if problems := _misfits(state, own):
        raise _refusal(weights, name, problems)
    try:
        # Not strict, since a net may rename keys of older versions while loading.
        found = net.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise _refusal(weights, name, str(error).splitlines()[1:]) from None
    missing = [key for key in found.missing_keys if key in own]
    extra = [key for key in found.unexpected_keys if not key.startswith(_AUXILIARY_HEADS)]
    lacks = [key for key in missing if key not in head]
    too_few = len(lacks) > _TOLERANCE * (len(own) - len(head)) or len(missing) == len(own)
    if too_few or len(extra) > max(len(head), _TOLERANCE * len(state)):
        problems = [f"{key} is missing" for key in (lacks or missing)]
        raise _refusal(weights, name, problems + [f"{key} is not of this net" for key in extra])
    line = f"{weights.where}: loaded {len(own) - len(missing)} of {len(own)} tensors"
    if new := [key for key in missing if key in head]:
        _start_near_zero(net, new, len(class_names))
        verb = "is" if len(new) == 1 else "are"
        line += f"; {', '.join(new)} {verb} new ({len(class_names)} classes)"
    line += about_classes
    if extra:
        line += f"; not used: {_few(extra, ', ')}"
    logger.info(line)
    if lacks:
        logger.warning(f"{weights.where} lacks {_few(lacks, ', ')}: random values are kept there")


def _adapted(
    weights: Weights, name: str, net: nn.Module, own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Stored tensors by the net's names, and those of timm as its version has them."""
    state = _renamed(weights.state, own)
    try:
        return timm_nets.adapted(state, net)
    except Exception as error:  # whatever tensors of odd shapes lead timm's code into
        raise _refusal(weights, name, [f"timm fails on it ({in_one_line(error)})"]) from error


def _head_keys(net: nn.Module, own: Mapping[str, Tensor]) -> list[str]:
    """The head's keys in a state dict: its parameters, and the buffers beside them."""
    parameters = dict(net.named_parameters(remove_duplicate=False))
    head = {id(parameters[name]) for name in head_parameters(net)}
    names = [name for name, each in parameters.items() if id(each) in head]
    owners = {name.rpartition(".")[0] for name in names}
    return [
        key
        for key in own
        if key in names or (key not in parameters and key.rpartition(".")[0] in owners)
    ]


def _fit_classes(
    state: dict[str, Tensor], head: Sequence[str], weights: Weights, class_names: Sequence[str]
) -> str:
    """Put the rows of a lightship checkpoint's head into the order of the classes, in place.

    Of other classes, or where its rows are not clearly the classes, it is dropped from `state`.

    Returns:
        What was done, in words; empty: nothing.
    """
    stored, count = weights.hyper_parameters.get("class_names"), len(class_names)
    kept = {key: state[key].shape for key in head if key in state}
    rows = [key for key, shape in kept.items() if shape[:1] == (count,)]
    is_clear = not any(count in shape[1:] for shape in kept.values())
    if not isinstance(stored, list) or not (rows or not is_clear):
        return ""
    theirs = [normal_form(str(each)) for each in stored]
    if theirs == list(class_names):
        return ""
    is_permuted = len(theirs) == count and set(theirs) == set(class_names)
    if is_permuted and is_clear:
        order = torch.tensor([theirs.index(each) for each in class_names])
        state.update({key: state[key][order] for key in rows})
        return "; the rows of its last layer are put into the order of these classes"
    for key in rows if is_clear else kept:
        del state[key]
    return f"; its last layer is of {'another order of the' if is_permuted else 'other'} classes"


@torch.no_grad()
def _start_near_zero(net: nn.Module, names: Sequence[str], num_classes: int) -> None:
    """Draw what gives the logits anew; not zero itself, which a ReLU behind it would keep.

    Other new layers of a head keep their own initial values.
    """
    parameters = dict(net.named_parameters())
    for name in names:
        parameter = parameters.get(name)
        if parameter is None or num_classes not in parameter.shape:
            continue
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=_HEAD_STD)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def _misfits(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Tensors whose shape or kind differs."""
    found = []
    for key in state:
        theirs, ours = state[key], own.get(key)
        if ours is None:
            continue
        if theirs.shape != ours.shape:
            found.append(f"{key} is {list(theirs.shape)}, the net's is {list(ours.shape)}")
        elif ours.is_floating_point() and not theirs.is_floating_point():
            found.append(f"{key} is {theirs.dtype}, the net's is {ours.dtype}")
    return found


def _refusal(weights: Weights, name: str, problems: Sequence[str]) -> ConfigError:
    text = _few([problem.strip() for problem in problems], "; ")
    return ConfigError(f"{weights.where} does not fit --model.net {name}: {text}")


def _few(items: Sequence[str], separator: str) -> str:
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return separator.join(items[:_NAMED]) + more


def _renamed(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors by the net's names: with the prefix that fits most of them exchanged."""
    # The oldest published DenseNets spell norm1 as norm.1 (see torchvision's densenet.py).
    spelled = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key): value
        for key, value in stored.items()
        if not _NOT_WEIGHTS.fullmatch(key)
    }

    def without(prefix: str, names: Mapping[str, Tensor]) -> set[str]:
        return {key.removeprefix(prefix) for key in names if key.startswith(prefix)}

    def matches(prefixes: tuple[str, str]) -> tuple[int, int]:
        theirs, ours = prefixes
        return len(without(theirs, spelled) & without(ours, own)), -len(theirs + ours)

    pairs = itertools.product(_prefixes(spelled), _prefixes(own))
    theirs, ours = max(pairs, key=matches)
    return {
        f"{ours}{key.removeprefix(theirs)}" if key.startswith(theirs) else key: value
        for key, value in spelled.items()
    }


def _prefixes(names: Mapping[str, Tensor]) -> list[str]:
    """The prefixes of most names that consist of wrappers' names; a forged file has thousands."""
    found = Counter({"": len(names)})
    for name in names:
        prefix = _WRAPPERS.match(name).group()  # type: ignore[union-attr]
        while prefix:
            found[prefix] += 1
            prefix = prefix[: prefix.rstrip(".").rfind(".") + 1]
    return sorted(prefix for prefix, _ in found.most_common(_MAX_PREFIXES))
