"""Dropout and stochastic depth of a known net, set from outside."""

from typing import Any

from torch import nn
from torchvision.ops import StochasticDepth

from lightship.errors import ConfigError

_TIMM_OPTIONS = {"dropout": "drop_rate", "drop_path": "drop_path_rate"}


def timm_options(dropout: float | None, drop_path: float | None) -> dict[str, float]:
    """Arguments of `timm.create_model`; timm's nets take both when they are built."""
    given = {"dropout": dropout, "drop_path": drop_path}
    return {_TIMM_OPTIONS[name]: value for name, value in given.items() if value is not None}


def set_dropping(net: nn.Module, dropout: float | None, drop_path: float | None) -> None:
    """Set the probabilities of a net's own layers, in place.

    A probability is ignored if the net has no layers of its kind (see `check_dropping`).

    Args:
        net: A net that is built.
        dropout: Of every dropout layer; None: as the net has it.
        drop_path: Of the last residual branch, rising from 0 at the first one (stochastic depth,
            Huang et al. 2016, arXiv 1603.09382); None: as the net has it.
    """
    for layer in _dropouts(net) if dropout is not None else []:
        layer.p = dropout
    branches = [part for part in net.modules() if isinstance(part, StochasticDepth)]
    for number, branch in enumerate(branches if drop_path is not None else []):
        branch.p = (drop_path or 0.0) * number / max(1, len(branches) - 1)


def check_dropping(
    net: nn.Module, name: str, dropout: float | None, drop_path: float | None
) -> None:
    """Check that what was asked for has an effect.

    Args:
        net: The net, after `set_dropping`.
        name: Its name, for errors.
        dropout: See `set_dropping`.
        drop_path: See `set_dropping`.

    Raises:
        ConfigError: The net has no such layers.
    """
    if dropout and not _dropouts(net) and getattr(net, "drop_rate", None) != dropout:
        raise ConfigError(f"--model.dropout {dropout:g}: {name} has no dropout; leave it out")
    # timm's layer has the paper's name.
    kinds = {type(part).__name__ for part in net.modules()}
    if drop_path and not kinds & {"DropPath", "StochasticDepth"}:
        raise ConfigError(
            f"--model.drop_path {drop_path:g}: {name} has no residual branches that can be "
            "dropped; leave it out"
        )


def _dropouts(net: nn.Module) -> list[Any]:
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    return [part for part in net.modules() if isinstance(part, kinds)]
