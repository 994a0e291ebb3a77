"""Collectives on plain values, and errors that name the ranks that do not answer.

With one process every function here is free of communication.
"""

import contextlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from lightship.console import log
from lightship.errors import LightshipError, PeerLost, TimeoutExpired

T = TypeVar("T")
_ROLL_CALL_S = 5.0
_LEAVE_S = 20.0
_store: dist.Store | None = None


def init_process_group(timeout_s: float, on_cuda: bool) -> None:
    """Join the process group that torchrun's variables describe. Every rank, once, first; blocks.

    CPU tensors use gloo, so that control messages never touch a GPU's stream; GPU tensors use
    NCCL. Lightning uses the same group.

    Args:
        timeout_s: Timeout of this wait and of each collective.
        on_cuda: Whether each rank drives a GPU.
    """
    # Lightning takes seconds to import, and a data worker needs none of it.
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    global _store
    timeout = timedelta(seconds=timeout_s)
    rank_zero_only.rank = int(os.environ["RANK"])  # type: ignore[attr-defined]
    log.set_rank(int(os.environ["RANK"]))
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    _store = dist.PrefixStore("lightship", store)


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


def broadcast_from_rank_0(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 alone and return its result on all. Every rank; blocks for rank 0.

    Args:
        work: Returns plain values or arrays.

    Raises:
        LightshipError: On every rank if `work` raised on rank 0, with its text and exit code.
    """
    if world_size() == 1:
        return work()
    if dist.get_rank() == 0:
        try:
            result = work()
        except BaseException as error:
            known = error if isinstance(error, LightshipError) else PeerLost(f"rank 0: {error!r}")
            dist.broadcast_object_list([None, (known.exit_name, str(known))])
            raise
        dist.broadcast_object_list([result, None])
        return result
    received: list[Any] = [None, None]
    dist.broadcast_object_list(received)
    result, failure = received
    if failure is not None:
        exit_name, text = failure
        on_rank_0 = LightshipError(text)
        on_rank_0.exit_name = exit_name
        raise on_rank_0
    return result


def on_rank_0(work: Callable[[], T]) -> T | None:
    """Call `work` on rank 0 alone and return its result there, None elsewhere.

    Every rank; blocks for rank 0. For what cannot be sent, or need not.

    Raises:
        LightshipError: As `broadcast_from_rank_0`.
    """
    results: list[T] = []
    broadcast_from_rank_0(lambda: results.append(work()))
    return results[0] if results else None


def local_rank_0_first(work: Callable[[], T]) -> T:
    """Call `work` on one rank of each node, which fills a cache, then on the node's other ranks.

    Every rank; blocks for the first ones.
    """
    is_turn = not is_initialized() or os.environ["LOCAL_RANK"] == "0"
    if is_turn:
        result = work()
    barrier()
    return result if is_turn else work()


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
    values: list[Any] = [None] * dist.get_world_size() if is_rank_0() else []
    dist.gather_object(value, values if is_rank_0() else None)
    return values


def all_gather(value: T) -> list[T]:
    """Every rank's value in rank order on every rank. Every rank; blocks."""
    if not is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_rank_0() -> None:
    """Let rank 0 finish writing before this rank exits. Every rank, when leaving.

    The launcher ends all processes when the first one exits.
    """
    key = "rank 0 has left"

    def meet(store: dist.Store) -> None:
        store.set(key, "") if is_rank_0() else store.wait([key], timedelta(seconds=_LEAVE_S))

    _query_store(meet, _LEAVE_S)


def node_cores() -> int:
    """CPU cores of this node that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


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
    results: SimpleQueue[T | None] = SimpleQueue()

    def call() -> None:
        result = None
        with contextlib.suppress(RuntimeError):  # gone
            result = query(_store) if _store is not None else None
        results.put(result)

    Thread(target=call, daemon=True).start()
    try:
        return results.get(timeout=timeout_s)
    except Empty:
        return None


def write_error_file(error: BaseException) -> None:
    """Write the error and its traceback where torch elastic's agent reads them, if there is one."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        text = str(error) if isinstance(error, LightshipError) else f"{error!r}"
        trace = "".join(traceback.format_exception(error))
        with open(path, "w") as file:
            json.dump({"message": text, "timestamp": int(time.time()), "trace": trace}, file)
