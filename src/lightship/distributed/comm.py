"""Collectives on plain values, and errors that name the ranks that do not answer.

With one process every function here is free of communication.
"""

import contextlib
import json
import os
import re
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from threading import Event, Thread
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from lightship import host
from lightship.console import log
from lightship.distributed import messages
from lightship.distributed.bounded import NoAnswer, call_within
from lightship.distributed.store import open_store
from lightship.errors import ConfigError, LightshipError, PeerLost, TakenOver, TimeoutExpired
from lightship.redaction import redact

T = TypeVar("T")
_ROLL_CALL_S = 5.0
_LEAVE_S = 20.0
_REPORT_S = 0.5  # below the least --trainer.timeout_s
_PIECE_BYTES = 2**24
_DONE, _FAILED, _WORKING = range(3)
_store: dist.Store | None = None
_timeout: timedelta | None = None


def init_process_group(timeout_s: float, on_cuda: bool) -> None:
    """Join the process group that torchrun's variables describe. Every rank, once, first; blocks.

    CPU tensors use gloo, so that control messages never touch a GPU's stream; GPU tensors use
    NCCL. Lightning uses the same group.

    Args:
        timeout_s: Timeout of this wait and of each collective.
        on_cuda: Whether each rank drives a GPU.

    Raises:
        ConfigError: There is no GPU for this rank.
    """
    if on_cuda:
        _choose_gpu(int(os.environ["LOCAL_RANK"]))
    # Lightning takes seconds to import, and an agent needs none of it.
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    global _store, _timeout
    timeout = _timeout = timedelta(seconds=timeout_s)
    rank_zero_only.rank = int(os.environ["RANK"])  # type: ignore[attr-defined]
    log.set_rank(int(os.environ["RANK"]))
    store, rank, world_size = open_store(timeout_s)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    _store = dist.PrefixStore("lightship", store)


def _choose_gpu(local_rank: int) -> None:
    seen = torch.cuda.device_count()
    if local_rank >= seen:
        raise ConfigError(
            f"this process is number {local_rank + 1} of its node and sees {seen} "
            f"GPU{'s' * (seen != 1)}: start one process per GPU, and under SLURM give the GPUs to "
            "the node (srun --gpus-per-node), not to each task (--gpus-per-task)"
        )
    torch.cuda.set_device(local_rank)


def new_cpu_group() -> Any:
    """All ranks once more, for CPU tensors, with the timeout of the first group, not torch's.

    Every rank; blocks for the others.
    """
    return dist.new_group(backend="gloo", timeout=_timeout)


def destroy_process_group() -> None:
    """Leave the group. Every rank, at the end; does not wait for the others."""
    if is_initialized():
        dist.destroy_process_group()


def is_initialized() -> bool:
    """Whether this process belongs to a group (possibly of one)."""
    return dist.is_available() and dist.is_initialized()


def is_rank_0() -> bool:
    """Whether this is rank 0, the only one that writes and logs."""
    return not is_initialized() or dist.get_rank() == 0


def world_size() -> int:
    """Processes of the job."""
    return dist.get_world_size() if is_initialized() else 1


def is_one_node() -> bool:
    """Whether all processes of the job are on this node."""
    return world_size() == 1 or world_size() == int(os.environ["LOCAL_WORLD_SIZE"])


def broadcast_from_rank_0(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 alone and return its result on all. Every rank; blocks for rank 0.

    Args:
        work: Returns what messages.py can encode; does not communicate. It may take longer than
            --trainer.timeout_s, which bounds the silence of a rank only.

    Raises:
        LightshipError: On every rank if `work` raised on rank 0, with its text and exit code.
    """
    result = _call_together(work if is_rank_0() else None)
    return cast(T, result if world_size() == 1 else _broadcast(result))


def broadcast_array(array: np.ndarray | None) -> np.ndarray:
    """Rank 0's array of numbers on every rank. Every rank; blocks.

    It is received in its place, in pieces of their own collectives: however large, it takes no
    second copy, and the timeout bounds a piece.

    Args:
        array: On rank 0, writable; None elsewhere.
    """
    if array is not None and world_size() == 1:
        return array
    kind, shape = _broadcast(None if array is None else (array.dtype.str, array.shape))
    whole = np.empty(shape, kind) if array is None else np.ascontiguousarray(array)
    for piece in torch.from_numpy(whole.reshape(-1).view(np.uint8)).split(_PIECE_BYTES):
        dist.broadcast(piece, 0)
    return whole


def on_rank_0(work: Callable[[], T]) -> T | None:
    """Call `work` on rank 0 alone and return its result there, None elsewhere.

    Every rank; blocks for rank 0. For what cannot be sent, or need not.

    Raises:
        LightshipError: As `broadcast_from_rank_0`.
    """
    return _call_together(work if is_rank_0() else None)


def on_every_rank(work: Callable[[], T]) -> T:
    """Call `work`, which does not communicate, on every rank. Blocks for the slowest.

    Raises:
        LightshipError: On every rank if `work` raised on any, with its text and exit code.
    """
    return cast(T, _call_together(work))


def local_rank_0_first(work: Callable[[], T]) -> T:
    """Call `work` on one rank of each node, which fills a cache, then on the node's other ranks.

    Every rank; blocks for the slowest. `work` does not communicate.

    Raises:
        LightshipError: On every rank if `work` raised on any, with its text and exit code.
    """
    is_first = not is_initialized() or os.environ["LOCAL_RANK"] == "0"
    first = _call_together(work if is_first else None)
    then = _call_together(None if is_first else work)
    return cast(T, first if is_first else then)


def _call_together(work: Callable[[], T] | None) -> T | None:
    """Call `work` where there is one; return when no rank works any more. Every rank.

    Ranks that work say so in a collective twice a second, from a thread: a rank that waits sees at
    once that another died, and within the timeout that another is frozen, however long work takes.

    Raises:
        LightshipError: On every rank if `work` raised on any, with its text and exit code.
    """
    if world_size() == 1:
        return work() if work is not None else None
    reports = _Reports(is_working=work is not None)
    try:
        result = work() if work is not None else None
    except BaseException as error:
        with contextlib.suppress(Exception):  # a lost rank says less than `error`
            reports.end(error)
        raise
    reports.end(None)
    return result


class _Reports:
    """Collectives by which each rank says, until all are done, whether it works.

    Args:
        is_working: Whether this rank does: a thread of it reports then.
    """

    def __init__(self, is_working: bool) -> None:
        self._done, self._has_failed, self._any_failed = Event(), False, False
        self._lost: Exception | None = None
        self._thread = Thread(target=self._report, daemon=True) if is_working else None
        if self._thread is not None:
            self._thread.start()

    def end(self, failure: BaseException | None) -> None:
        """Wait for the ranks that still work. Raises the failure of another if this has none."""
        self._has_failed = failure is not None
        self._done.set()
        if self._thread is None:
            self._report()
        else:
            self._thread.join()
        if self._lost is not None:
            raise self._lost
        if self._any_failed:
            mine = None if failure is None else _name_and_text(failure)
            exit_name, text = next(filter(None, all_gather(mine)))
            if failure is None:
                elsewhere = LightshipError(text)
                elsewhere.exit_name = exit_name
                raise elsewhere

    def _report(self) -> None:
        most = _WORKING
        try:
            while most == _WORKING:
                is_done = self._done.wait(_REPORT_S)
                state = (_FAILED if self._has_failed else _DONE) if is_done else _WORKING
                states = torch.tensor(state, dtype=torch.uint8)
                dist.all_reduce(states, op=dist.ReduceOp.MAX)
                most = int(states)
            self._any_failed = most == _FAILED
        except Exception as error:
            self._lost = error


def _name_and_text(error: BaseException) -> tuple[str, str]:
    """How an error ends the ranks that do not have it: name of the exit code, and text."""
    if isinstance(error, LightshipError):
        return error.exit_name, str(error)
    return PeerLost.exit_name, f"rank {dist.get_rank()}: {error!r}"


def barrier() -> None:
    """Wait for all ranks. Every rank; blocks."""
    all_reduce_any(False)


def all_reduce_any(flag: bool) -> bool:
    """Whether `flag` is set on any rank. Every rank; blocks for the others."""
    if not is_initialized():
        return flag
    raised = torch.tensor(flag, dtype=torch.uint8)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised)


def gather_to_rank_0(value: T) -> list[T]:
    """Every rank's value in rank order on rank 0, [] on the others. Every rank; blocks."""
    if not is_initialized():
        return [value]
    data, sizes = _padded(value)
    gathered = [torch.empty_like(data) for _ in sizes] if is_rank_0() else None
    dist.gather(data, gathered)
    return [_decoded(each, size) for each, size in zip(gathered or (), sizes, strict=False)]


def all_gather(value: T) -> list[T]:
    """Every rank's value in rank order on every rank. Every rank; blocks."""
    if not is_initialized():
        return [value]
    data, sizes = _padded(value)
    gathered = [torch.empty_like(data) for _ in sizes]
    dist.all_gather(gathered, data)
    return [_decoded(each, size) for each, size in zip(gathered, sizes, strict=True)]


def sum_float64(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The sums over all ranks of CPU tensors, as float64. Every rank; blocks."""
    flat = torch.cat([value.double().flatten() for value in values])
    if is_initialized():
        dist.all_reduce(flat)
    parts = flat.split([value.numel() for value in values])
    return [part.view_as(value) for part, value in zip(parts, values, strict=True)]


# Torch's own calls for objects (broadcast_object_list, all_gather_object) unpickle what arrives.


def _broadcast(value: Any = None) -> Any:
    """Rank 0's value on every rank. Every rank; blocks."""
    data = _as_tensor(messages.encode(value)) if is_rank_0() else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor(len(data))
    dist.broadcast(size, 0)
    data = data if is_rank_0() else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, 0)
    return value if is_rank_0() else _decoded(data, int(size))


def _padded(value: Any) -> tuple[torch.Tensor, list[int]]:
    """(a value as uint8, as long as the longest of all ranks; the length of each rank's)."""
    data = _as_tensor(messages.encode(value))
    sizes = [torch.tensor(0) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor(len(data)))
    longest = max(map(int, sizes))
    return torch.nn.functional.pad(data, (0, longest - len(data))), list(map(int, sizes))


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _decoded(data: torch.Tensor, size: int) -> Any:
    return messages.decode(data[:size].numpy().tobytes())


def wait_for_rank_0() -> None:
    """Let rank 0 finish writing before this rank exits. Every rank, when leaving.

    The launcher ends all processes when the first one exits.
    """
    key = "rank 0 has left"

    def meet(store: dist.Store) -> None:
        store.set(key, "") if is_rank_0() else store.wait([key], timedelta(seconds=_LEAVE_S))

    _query_store(meet, _LEAVE_S)


def node_cores() -> int:
    """CPU cores of this node that this process may use, within its container's limit."""
    return host.usable_cores()


def cores() -> int:
    """This rank's share of its node's cores, at least 1."""
    ranks_here = int(os.environ["LOCAL_WORLD_SIZE"]) if is_initialized() else 1
    return max(1, node_cores() // ranks_here)


def translate_error(error: BaseException) -> BaseException:
    """`error`, or, if torch.distributed raised it, the PeerLost or TimeoutExpired that it means.

    After a timeout blocks up to 6 s to find out which ranks do not answer.
    """
    text = " ".join(str(error).split())
    from_gloo = isinstance(error, RuntimeError) and "gloo" in text
    if not (from_gloo or isinstance(error, dist.DistError)):
        return error
    reason = re.sub(r"^\[.*?\] *|\. This may indicate.*", "", text)[:300]
    if not re.search(r"tim(?:ed|e) ?-?out", text, re.IGNORECASE):
        return PeerLost(f"lost another rank: {reason}")
    silent = _silent_ranks()
    who = f"no answer from rank {', '.join(map(str, silent))}" if silent else "the ranks waited"
    return TimeoutExpired(f"{who} within --trainer.timeout_s: {reason}")


def _silent_ranks() -> list[int]:
    """The ranks that do not report to the store, as each rank does after a timeout."""
    if _store is None:
        return []  # the group was never complete; torch's text says how many ranks joined
    keys = [f"rank {rank} is here" for rank in range(dist.get_world_size())]

    def roll_call(store: dist.Store) -> list[int]:
        store.set(keys[dist.get_rank()], "")
        until = time.monotonic() + _ROLL_CALL_S
        while not store.check(keys) and time.monotonic() < until:
            time.sleep(0.1)
        return [rank for rank, key in enumerate(keys) if not store.check([key])]

    silent = _query_store(roll_call, _ROLL_CALL_S + 1)
    return [0] if silent is None else silent  # rank 0 hosts the store


def _query_store(query: Callable[[dist.Store], T], timeout_s: float) -> T | None:
    """`query`'s result; None if the store is gone or frozen (torch's call then never returns)."""
    with contextlib.suppress(RuntimeError, NoAnswer):  # gone, frozen
        return call_within(timeout_s, lambda: query(_store) if _store is not None else None)
    return None


def write_error_file(error: BaseException) -> None:
    """Write the error and its traceback where torch elastic's agent reads them, if there is one."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        text = str(error) if isinstance(error, LightshipError) else f"{error!r}"
        trace = redact("".join(traceback.format_exception(error)))
        facts = {"message": redact(text), "timestamp": int(time.time()), "trace": trace}
        facts["is_taken_over"] = isinstance(error, TakenOver)
        with open(f"{path}.part", "w") as file:
            json.dump(facts, file)
        os.replace(f"{path}.part", path)  # whole: the agent may end this process at any moment
