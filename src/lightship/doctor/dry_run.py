"""A few training steps on made-up images: what the net takes in memory, and how fast it is."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightship.config import Config
from lightship.models.nets.build import build_net
from lightship.models.optim.build import build_optimizer

_FEW, _MORE = 2, 4  # two batch sizes tell what grows with the batch
_TIMED_S = 1.5
_MOST_ON_CPU = 32
_MOST_STEPS = 20
_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}


@dataclass(frozen=True)
class Trial:
    """What a step takes.

    Attributes:
        parameters: Numbers in the net.
        fixed_bytes: Weights, gradients, the optimizer's state, averaged weights.
        image_bytes: What one image of a training batch keeps until the backward pass.
        eval_image_bytes: What one image of an evaluation batch takes at the widest layer.
        images_per_s: Of training on one device; None: not measured.
    """

    parameters: int
    fixed_bytes: int
    image_bytes: int
    eval_image_bytes: int
    images_per_s: float | None


def try_steps(config: Config, size_px: int, classes: int, device: torch.device) -> Trial:
    """Build the net without published weights, and train it for a moment. Blocks for seconds.

    Args:
        config: Of the fit.
        size_px: Side of the images.
        classes: Their number.
        device: Where the fit will train; what is kept is counted on the CPU.

    Raises:
        ConfigError: The net cannot be built.
    """
    net = build_net(config.model.net, classes, size_px)
    if config.model.channels_last:
        net.to(memory_format=torch.channels_last)
    kind, _, mixed = config.trainer.precision.partition("-")
    dtype = _DTYPES.get(kind, torch.float32)
    if mixed == "true" and dtype != torch.float32:
        net.to(dtype)
    autocast = dtype if mixed == "mixed" else None
    few, more = (
        _kept_bytes(net, _images(net, count, size_px), autocast) for count in (_FEW, _MORE)
    )
    widest = _widest_bytes(net, _images(net, 1, size_px))
    state = _stepper(config, net, classes, autocast)(_images(net, _FEW, size_px))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())
    return Trial(
        sum(parameter.numel() for parameter in net.parameters()),
        2 * weights + state + (weights if config.model.ema_decay else 0),
        max(0, more - few) // (_MORE - _FEW),
        widest,
        _speed(config, net, partial(_stepper, config, net, classes, autocast), size_px, device),
    )


def _images(net: nn.Module, count: int, size_px: int) -> Tensor:
    like = next(net.parameters())
    return torch.rand(count, 3, size_px, size_px, dtype=like.dtype, device=like.device)


def _kept_bytes(net: nn.Module, images: Tensor, autocast: torch.dtype | None) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        _cast(images.device, autocast),
    ):
        net(images)
    return sum(kept.values())


def _widest_bytes(net: nn.Module, image: Tensor) -> int:
    """Most bytes of one layer's input and output together."""
    widest = [0]

    def look(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [each for each in (*inputs, output) if isinstance(each, Tensor)]
        widest.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    hooks = [layer.register_forward_hook(look) for layer in net.modules()]
    net.eval()
    with torch.no_grad():
        net(image)
    net.train()
    for hook in hooks:
        hook.remove()
    return max(widest)


def _stepper(
    config: Config, net: nn.Module, classes: int, autocast: torch.dtype | None
) -> Callable[[Tensor], int]:
    """What does one training step with a batch, and tells the bytes of the optimizer's state."""
    optim = config.optim
    optimizer = build_optimizer(net, optim.name, optim.lr, optim.momentum, optim.weight_decay)

    def step(images: Tensor) -> int:
        labels = torch.arange(len(images), device=images.device) % classes
        with _cast(images.device, autocast):
            loss = nn.functional.cross_entropy(net(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state = [value for each in optimizer.state.values() for value in each.values()]
        return sum(v.numel() * v.element_size() for v in state if isinstance(v, Tensor))

    return step


def _speed(
    config: Config,
    net: nn.Module,
    build_step: Callable[[], Callable[[Tensor], int]],
    size_px: int,
    device: torch.device,
) -> float | None:
    count = config.data.global_batch_size // config.trainer.accumulate_grad_batches
    try:
        net.to(device)
        step = build_step()
        return _measured(net, step, count, size_px, device)
    except torch.cuda.OutOfMemoryError:
        return None  # the estimate of memory tells of that


def _measured(
    net: nn.Module,
    step: Callable[[Tensor], int],
    count: int,
    size_px: int,
    device: torch.device,
) -> float:
    if device.type == "cpu":
        # As many as take half of the time; a CPU is no faster with more.
        few, begun_s = _images(net, _FEW, size_px), time.perf_counter()
        step(few)
        image_s = (time.perf_counter() - begun_s) / _FEW
        count = min(count, _MOST_ON_CPU, max(_FEW, int(_TIMED_S / 2 / image_s)))
    images = _images(net, count, size_px)
    step(images)  # the first is slower than all others
    _wait(device)
    times_s: list[float] = []
    while not times_s or (sum(times_s) < _TIMED_S and len(times_s) < _MOST_STEPS):
        begun_s = time.perf_counter()
        step(images)
        _wait(device)
        times_s.append(time.perf_counter() - begun_s)
    return count / min(times_s)  # in the others something else had its turn


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cast(device: torch.device, dtype: torch.dtype | None) -> Any:
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
