"""Whether the model, its batch and the data fit into memory."""

from dataclasses import dataclass

import torch

from lightship.config import Config
from lightship.data.regime import is_streamed
from lightship.doctor.checks import Finding, skipped
from lightship.doctor.context import Context
from lightship.doctor.dry_run import StepCost, step_cost
from lightship.doctor.rendezvous import count_ranks
from lightship.doctor.samples import first_samples
from lightship.errors import LightshipError
from lightship.host import read_limits, usable_memory_bytes
from lightship.training.out_of_memory import smaller_evaluation_batch, smaller_training_batch

_GIB = 2**30
# Fitted to the peaks of litcnn, resnet18 and mobilenet_v3_small on a CPU (within 10 %).
_PROCESS_BYTES = int(0.9 * _GIB)  # Python, torch, Lightning and their caches
_BACKWARD = 1.5  # what the backward pass needs beside what the forward pass keeps
_CONTEXT_BYTES = int(0.8 * _GIB)  # CUDA's context and its libraries' work space, on the GPU
_TIGHT = 0.9


@dataclass(frozen=True)
class Room:
    """Available memory.

    Attributes:
        processes: On this node.
        ranks: Of the job.
        host_bytes: Memory of this node, or the container's limit; None: unknown.
        gpu_bytes: Of one GPU; None: training on the CPU.
    """

    processes: int
    ranks: int
    host_bytes: int | None
    gpu_bytes: int | None


def model_memory(context: Context) -> Finding:
    """The memory of a training or evaluation step against that of GPU or node. Blocks.

    Raises:
        ConfigError: The net cannot be built.
    """
    if context.config.trainer.is_on_tpu:
        return skipped("--trainer.accelerator tpu: XLA plans the chips' memory itself")
    cost = context.once(step_cost)
    if cost is None:
        return skipped("the images' size is unknown, see data")
    gpu = torch.cuda.get_device_properties(0).total_memory if context.on_gpus else None
    host = usable_memory_bytes(read_limits())
    room = Room(context.processes_or_one, count_ranks(context), host, gpu)
    return estimate(context.config, cost, room, _data_bytes(context))


def _data_bytes(context: Context) -> int:
    """What a process holds of the data where training runs; 0 where that is unknown."""
    data = context.config.data
    try:
        first = context.once(first_samples)
        size_px = first.size_px(data)
    except LightshipError:
        return 0
    decoded = 3 * (size_px or 0) ** 2 * (first.count or 0)
    if is_streamed(data) or decoded > data.resident_gib * _GIB:
        return 0 if context.on_gpus else int(data.prefetch_gib * _GIB)
    return decoded


def estimate(config: Config, cost: StepCost, room: Room, data_bytes: int) -> Finding:
    """The same, of these numbers.

    Args:
        config: Of the fit.
        cost: Of a step.
        room: Available memory.
        data_bytes: What a process holds of the data (decoded set, or what is prefetched).
    """
    data, parts = config.data, config.trainer.accumulate_grad_batches
    batch = max(1, data.global_batch_size // room.ranks // parts)
    training = int(_BACKWARD * batch * cost.image_bytes)
    evaluation = data.eval_batch_size * cost.eval_image_bytes
    largest = max(training, evaluation)
    needed, where = _CONTEXT_BYTES + cost.fixed_bytes + largest + data_bytes, "GPU"
    if room.gpu_bytes is None:
        each = _PROCESS_BYTES + cost.fixed_bytes + largest + data_bytes
        needed, where = room.processes * each, "node"
    available = room.gpu_bytes or room.host_bytes
    if available is None:
        return skipped(f"about {needed / _GIB:.1f} GiB needed; available memory is unknown")
    if training >= evaluation:
        batches = f"training batch of {batch}"
        smaller = smaller_training_batch(config)
    else:
        batches = f"evaluation batch of {data.eval_batch_size}"
        smaller = smaller_evaluation_batch(config)
    found = (
        f"about {needed / _GIB:.1f} of {available / _GIB:.1f} GiB per {where}: "
        f"{cost.parameters / 1e6:.2f} M parameters and their state {cost.fixed_bytes / _GIB:.2f}, "
        f"{batches} {largest / _GIB:.2f}, data {data_bytes / _GIB:.2f}"
    )
    if room.processes > 1 and room.gpu_bytes is None:
        found += f" ({room.processes} processes)"
    fix = f"{smaller}; or a higher memory limit, a smaller --data.image_size_px, another net"
    if needed > available:
        return Finding("fail", found, "fit is killed, or runs out of memory", fix)
    if needed > _TIGHT * available:
        return Finding("warn", found, "tight: the estimate is within about 20 %", fix)
    return Finding("ok", found, "enough memory")
