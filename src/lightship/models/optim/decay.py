"""Which parameters weight decay acts on, in the version that a run began with."""

import re
from fnmatch import fnmatch

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightship import versions

FIRST, NEWEST = 1, versions.VERSIONS["decay"]
_MATRIX_LAYERS = (nn.Linear, nn.Bilinear, _ConvNd, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_POSITIONS = re.compile(r"(^|_)(pos|position\w*)(_|$)|_token|attention_bias")


def decayed_parameters(net: nn.Module, version: int = NEWEST) -> set[str]:
    """Names of the parameters with weight decay: matrices and filters.

    Not those that `net.no_weight_decay()` names (timm's convention, patterns allowed), nor
    position embeddings, class tokens, relative position biases and layer scales, where layers of
    torch do not hold them: a parameter with one dimension of more than one value, one that is
    added to each image of a batch (its first dimension is 1), or one named so.

    Args:
        net: The net.
        version: 1 (of 0.1.0): all with two or more dimensions; 2: as above.
    """
    matrices = {name: each for name, each in net.named_parameters() if each.ndim >= 2}
    if version == FIRST:
        return set(matrices)
    excluded = net.no_weight_decay() if hasattr(net, "no_weight_decay") else ()  # type: ignore[operator]
    parts = dict(net.named_modules(remove_duplicate=False))
    return {
        name
        for name, each in matrices.items()
        if not any(fnmatch(name, pattern) for pattern in excluded)
        and _is_matrix(parts[name.rpartition(".")[0]], name.rpartition(".")[2], each)
    }


def _is_matrix(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if isinstance(owner, _MATRIX_LAYERS):
        return True
    is_vector = max(parameter.shape) == parameter.numel() or parameter.shape[0] == 1
    return not (
        isinstance(owner, _NORMS) or is_vector or name.endswith("bias") or _POSITIONS.search(name)
    )
