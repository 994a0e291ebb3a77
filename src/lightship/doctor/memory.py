"""Whether the model, its batch and the data fit into memory."""

from dataclasses import dataclass

from lightship.config import Config
from lightship.doctor.check import Finding
from lightship.doctor.dry_run import Trial

_GIB = 2**30
# Fitted to the peaks of litcnn, resnet18 and mobilenet_v3_small on a CPU (within 10 %).
_PROCESS_BYTES = int(0.9 * _GIB)  # Python, torch, Lightning and their caches
_BACKWARD = 1.5  # what the backward pass needs beside what the forward pass keeps
_CONTEXT_BYTES = int(0.8 * _GIB)  # CUDA's context and its libraries' work space, on the GPU
_TIGHT = 0.9


@dataclass(frozen=True)
class Room:
    """What there is.

    Attributes:
        processes: On this node.
        ranks: Of the job.
        host_bytes: Memory of this node, or the container's limit; None: not known.
        gpu_bytes: Of one GPU; None: training on the CPU.
    """

    processes: int
    ranks: int
    host_bytes: int | None
    gpu_bytes: int | None


def estimate(config: Config, trial: Trial, room: Room, data_bytes: int) -> Finding:
    """The step's and the data's memory against the GPU's, or the container's.

    Args:
        config: Of the fit.
        trial: What a step takes.
        room: What there is.
        data_bytes: What a process holds of the data (decoded set, or what is read ahead).
    """
    data = config.data
    batch = max(1, data.global_batch_size // room.ranks // config.trainer.accumulate_grad_batches)
    training = int(_BACKWARD * batch * trial.image_bytes)
    evaluation = data.eval_batch_size * trial.eval_image_bytes
    is_training = training >= evaluation
    step = trial.fixed_bytes + max(training, evaluation)
    if room.gpu_bytes is not None:
        needed, there, where = _CONTEXT_BYTES + step + data_bytes, room.gpu_bytes, "GPU"
    else:
        needed, where = room.processes * (_PROCESS_BYTES + step + data_bytes), "node"
        if room.host_bytes is None:
            return Finding(
                "skipped", f"about {needed / _GIB:.1f} GiB are needed; what there is is not known"
            )
        there = room.host_bytes
    widest = f"training batch of {batch}" if is_training else f"evaluation {data.eval_batch_size}"
    told = (
        f"about {needed / _GIB:.1f} of {there / _GIB:.1f} GiB a {where}: "
        f"{trial.parameters / 1e6:.2f} M parameters and their state "
        f"{trial.fixed_bytes / _GIB:.2f}, {widest} {max(training, evaluation) / _GIB:.2f}, "
        f"data {data_bytes / _GIB:.2f}"
    )
    if room.processes > 1 and room.gpu_bytes is None:
        told += f" ({room.processes} processes)"
    smaller = (
        f"--trainer.accumulate_grad_batches {2 * config.trainer.accumulate_grad_batches} or more, "
        "or a smaller --data.global_batch_size"
        if is_training
        else f"--data.eval_batch_size {max(1, data.eval_batch_size // 4)} (results do not change)"
    )
    fix = f"{smaller}; or raise the memory limit, a smaller --data.image_size_px, another net"
    if needed > there:
        return Finding("fail", told, "the fit is killed, or ends out of memory", fix)
    if needed > _TIGHT * there:
        return Finding("warn", told, "tight: an estimate is right to a fifth or so", fix)
    return Finding("ok", told, "there is room")
