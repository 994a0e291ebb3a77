"""A few training steps on random images: the net's memory, and its speed."""

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightship.config import Config
from lightship.devices import fastest_precision
from lightship.doctor.allreduce import all_reduce
from lightship.doctor.context import Context
from lightship.doctor.samples import first_samples
from lightship.errors import LightshipError
from lightship.models.nets.build import build_net
from lightship.models.nets.recompute import recompute_blocks
from lightship.models.optim.build import build_optimizer

_CLASSES = 1000  # where their number is not known
_FEW, _MORE = 2, 4  # two batch sizes show what grows with the batch
_TIMED_S = 1.5
_MAX_BATCH_ON_CPU, _MAX_STEPS = 32, 20
_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}


@dataclass(frozen=True)
class StepCost:
    """What a training step takes.

    Attributes:
        parameters: Number of parameters.
        fixed_bytes: Weights, gradients, the optimizer's state, averaged weights.
        image_bytes: What one image of a training batch keeps until the backward pass.
        eval_image_bytes: What one image of an evaluation batch takes at the widest layer.
        images_per_s: Training speed of one device; None: not measured.
    """

    parameters: int
    fixed_bytes: int
    image_bytes: int
    eval_image_bytes: int
    images_per_s: float | None


def step_cost(context: Context) -> StepCost | None:
    """Cost of the fit's steps on this node; None where the images' size is unknown. Blocks.

    Raises:
        ConfigError: The net cannot be built.
    """
    size_px, classes = context.config.data.image_size_px, None
    with suppress(LightshipError):  # the check `data` reports it
        first = context.once(first_samples)
        size_px, classes = first.size_px(context.config.data), first.classes
    if size_px is None:
        return None
    context.once(all_reduce)  # its processes would slow this down
    device = torch.device("cuda", 0) if context.on_gpus else torch.device("cpu")
    return measure(context.config, size_px, classes or _CLASSES, device)


def measure(config: Config, size_px: int, classes: int, device: torch.device) -> StepCost:
    """Build the net without published weights, and train it for a moment. Blocks for seconds.

    Args:
        config: Of the fit.
        size_px: Side of the images.
        classes: Their number.
        device: Where to measure the speed; memory is counted on the CPU.

    Raises:
        ConfigError: The net cannot be built.
    """
    trial = _Trial(config, size_px, classes)
    few, more = (trial.kept_bytes(count) for count in (_FEW, _MORE))
    widest = trial.widest_bytes()
    weights = sum(parameter.nbytes for parameter in trial.net.parameters())
    fixed = 2 * weights + trial.state_bytes() + (weights if config.model.ema_decay else 0)
    batch_size = config.data.global_batch_size // config.trainer.accumulate_grad_batches
    try:
        images_per_s = trial.images_per_s(batch_size, device)
    except torch.cuda.OutOfMemoryError:
        images_per_s = None  # the check `model memory` reports it
    parameters = sum(parameter.numel() for parameter in trial.net.parameters())
    return StepCost(parameters, fixed, max(0, more - few) // (_MORE - _FEW), widest, images_per_s)


class _Trial:
    """Steps of the fit's net on random images."""

    def __init__(self, config: Config, size_px: int, classes: int) -> None:
        self.optim, self.size_px, self.classes = config.optim, size_px, classes
        asked = config.model
        self.net = build_net(asked.net, classes, size_px, asked.dropout, asked.drop_path)
        if asked.grad_checkpointing:
            recompute_blocks(self.net, f"--model.net {asked.net}")
        if asked.channels_last:
            self.net.to(memory_format=torch.channels_last)
        precision = fastest_precision(config.trainer.precision, config.trainer.accelerator)
        kind, _, mode = precision.partition("-")
        dtype = _DTYPES.get(kind, torch.float32)
        if mode == "true":
            self.net.to(dtype)
        self.autocast = dtype if mode == "mixed" else None

    def images(self, count: int) -> Tensor:
        """[count, 3, S, S] on the net's device, in its dtype."""
        like = next(self.net.parameters())
        shape = (count, 3, self.size_px, self.size_px)
        return torch.rand(shape, dtype=like.dtype, device=like.device)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, as the trainer's precision computes them."""
        with torch.autocast(images.device.type, self.autocast, self.autocast is not None):
            return self.net(images)

    def restart(self) -> None:
        """A new optimizer, on the net's device."""
        o = self.optim
        self.optimizer = build_optimizer(self.net, o.name, o.lr, o.momentum, o.weight_decay)

    def step_s(self, images: Tensor) -> float:
        """Seconds of one training step."""
        started_s = time.perf_counter()
        labels = torch.arange(len(images), device=images.device) % self.classes
        nn.functional.cross_entropy(self.forward(images).float(), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - started_s

    def kept_bytes(self, count: int) -> int:
        """What a forward pass of `count` images keeps for the backward pass, without weights."""
        weights = {weight.untyped_storage().data_ptr() for weight in self.net.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.forward(self.images(count))
        return sum(kept.values())

    def widest_bytes(self) -> int:
        """Largest sum of a layer's input and output, of one image."""
        sizes = [0]

        def look(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            sizes.append(sum(x.nbytes for x in (*inputs, output) if isinstance(x, Tensor)))

        hooks = [layer.register_forward_hook(look) for layer in self.net.modules()]
        self.net.eval()
        with torch.no_grad():
            self.net(self.images(1))
        self.net.train()
        for hook in hooks:
            hook.remove()
        return max(sizes)

    def state_bytes(self) -> int:
        """Of the optimizer's state after a step."""
        self.restart()
        self.step_s(self.images(_FEW))
        state = [value for each in self.optimizer.state.values() for value in each.values()]
        return sum(value.nbytes for value in state if isinstance(value, Tensor))

    def images_per_s(self, batch_size: int, device: torch.device) -> float:
        """Of the fastest step on a device."""
        self.net.to(device)
        self.restart()
        if device.type == "cpu":
            # As many as take half of the time; a CPU is no faster with more.
            image_s = self.step_s(self.images(_FEW)) / _FEW
            fitting = max(_FEW, int(_TIMED_S / 2 / image_s))
            batch_size = min(batch_size, _MAX_BATCH_ON_CPU, fitting)
        images = self.images(batch_size)
        self.step_s(images)  # the first is the slowest
        times_s: list[float] = []
        while not times_s or (sum(times_s) < _TIMED_S and len(times_s) < _MAX_STEPS):
            times_s.append(self.step_s(images))
        return batch_size / min(times_s)  # the others shared the device with something else
