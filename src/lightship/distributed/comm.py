"""This process among those of its job: the group, what rank 0 does for all, and who is missing.

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

from lightship.errors import LightshipError, PeerLost, TimeoutExpired

T = TypeVar("T")
_ROLL_CALL_S = 5.0
_LEAVE_S = 20.0
_store: dist.Store | None = None


def open_group(timeout_s: float, on_cuda: bool) -> None:
    """Join the others as torchrun's variables say. Every rank, once, before anything else; blocks.

    Tensors on the CPU travel by gloo, so that talking about the run never touches a GPU's stream;
    those on a GPU by NCCL. Lightning finds the group and uses it.

    Args:
        timeout_s: Bound of this wait and of each collective.
        on_cuda: Whether each rank drives a GPU.
    """
    # Here, because Lightning takes seconds to import and a data worker needs none of it.
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    global _store
    bound = timedelta(seconds=timeout_s)
    rank_zero_only.rank = int(os.environ["RANK"])  # type: ignore[attr-defined]
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world_size = next(rendezvous("env://", timeout=bound))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=bound,
    )
    _store = dist.PrefixStore("lightship", store)


def close_group() -> None:
    """Leave the group in good order. Every rank, at the end; does not wait for the others."""
    if is_open():
        dist.destroy_process_group()


def is_open() -> bool:
    """Whether a launcher made this process one of a group (possibly a group of one)."""
    return dist.is_available() and dist.is_initialized()


def is_first() -> bool:
    """Whether this is rank 0, the only one that writes, logs and talks."""
    return not is_open() or dist.get_rank() == 0


def world_size() -> int:
    """Processes of the job."""
    return dist.get_world_size() if is_open() else 1


def from_rank_0(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, which alone does it. Every rank; blocks for rank 0.

    Args:
        work: Its result, plain values or arrays, is sent to all.

    Raises:
        LightshipError: On every rank, if `work` raised on rank 0: with its text and exit code.
    """
    if not is_open() or dist.get_world_size() == 1:
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
    told: list[Any] = [None, None]
    dist.broadcast_object_list(told)
    if told[1] is not None:
        failure = LightshipError(told[1][1])
        failure.exit_name = told[1][0]
        raise failure
    return told[0]


def first_on_each_node(work: Callable[[], T]) -> T:
    """What `work` returns here, done first by one rank of each node, which fills a cache for all.

    Every rank; blocks for the first ones.
    """
    is_turn = not is_open() or os.environ["LOCAL_RANK"] == "0"
    if is_turn:
        result = work()
    any_rank(False)
    return result if is_turn else work()


def cores() -> int:
    """This process's share of the cores that its node's ranks may use, at least 1."""
    here = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, here // (int(os.environ["LOCAL_WORLD_SIZE"]) if is_open() else 1))


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank. Every rank; blocks for the others."""
    if not is_open():
        return flag
    raised = torch.tensor(flag, dtype=torch.uint8)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised)


def gather(value: T) -> list[T]:
    """Every rank's value in rank order on rank 0; nothing on the others. Every rank; blocks."""
    if not is_open():
        return [value]
    values: list[Any] = [None] * dist.get_world_size() if is_first() else []
    dist.gather_object(value, values if is_first() else None)
    return values


def all_gather(value: T) -> list[T]:
    """Every rank's value in rank order on every rank. Every rank; blocks."""
    if not is_open():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_rank_0() -> None:
    """Let rank 0 finish writing before this rank's end stops the job. Every rank, when leaving.

    The first end is taken for everybody's by whoever started the processes.
    """
    key = "rank 0 has left"

    def meet(store: dist.Store) -> None:
        store.set(key, "") if is_first() else store.wait([key], timedelta(seconds=_LEAVE_S))

    _ask_store(meet, _LEAVE_S)


def explained(error: BaseException) -> BaseException:
    """`error`, or what it means if it comes from torch.distributed: a peer lost, or silence.

    Blocks a few seconds after a silence, to learn which ranks do not answer.
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
    """The ranks that do not report at the store, to which each rank comes after a time-out."""
    if _store is None:
        return []  # the group has not come together; torch tells how many have
    keys = [f"rank {rank} is here" for rank in range(dist.get_world_size())]

    def roll_call(store: dist.Store) -> list[int]:
        store.set(keys[dist.get_rank()], "")
        until = time.monotonic() + _ROLL_CALL_S
        while not store.check(keys) and time.monotonic() < until:
            time.sleep(0.1)
        return [rank for rank, key in enumerate(keys) if not store.check([key])]

    silent = _ask_store(roll_call, _ROLL_CALL_S + 1)
    return [0] if silent is None else silent  # rank 0 keeps the store


def _ask_store(question: Callable[[dist.Store], T], bound_s: float) -> T | None:
    """What the store answers; None if it is gone, or frozen (torch's call then has no bound)."""
    answers: SimpleQueue[T | None] = SimpleQueue()

    def ask() -> None:
        answer = None
        with contextlib.suppress(RuntimeError):  # gone
            answer = question(_store) if _store is not None else None
        answers.put(answer)

    Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=bound_s)
    except Empty:
        return None


def record_end(error: BaseException) -> None:
    """Leave a line and a trace where torch elastic's agent looks for them, if there is one."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        text = str(error) if isinstance(error, LightshipError) else f"{error!r}"
        trace = "".join(traceback.format_exception(error))
        with open(path, "w") as file:
            json.dump({"message": text, "timestamp": int(time.time()), "trace": trace}, file)
