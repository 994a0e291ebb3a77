"""The worker: a rank's process that fetches and decodes batches into shared memory.

One process a rank, so that no block is fetched twice; its threads decode, since the decoders
release the GIL. It runs `main`, which accepts tasks (from worker_process.py) and runs each in its
own threads, side by side.
"""

import contextlib
import gc
import importlib
import logging
import os
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from lightship import storage
from lightship.console import streams
from lightship.data.batch import NOT_COUNTED
from lightship.data.draws import uniform
from lightship.data.images import scaling
from lightship.data.sample_reader import Raw, checked
from lightship.data.streaming import pickle_with_files
from lightship.data.streaming.cache import BlockCache
from lightship.data.streaming.messages import Decoded, Failed, LogLine, Task
from lightship.data.streaming.prefetch import FetchedBatch, Fetcher
from lightship.data.streaming.worker_process import IDLE, SharedSlots
from lightship.errors import DataError, LightshipError
from lightship.redaction import learn

_ROWS_AT_ONCE = 8
_NO_MORE = -1
_MAX_DESCRIPTORS = 8
_BOX_TRIES, _BOX_STREAM = 10, 2**31  # a seed that no run's own draws use

Outbox = SimpleQueue[tuple[FetchedBatch, int, list[Future]] | LogLine | None]
"""(batch, its slot, its pieces being decoded), and lines, in the order they are sent; None: end."""


def main(descriptor: int) -> None:
    """Run the tasks that arrive on a socket until its other end is closed; then exit.

    Tasks run side by side, so none may change the environment.

    Args:
        descriptor: Of the socket. It carries a URL that will be read and whether log lines are
            JSON, then pickled tasks, each followed by a byte with descriptors: of the task's own
            connection, of the shared memory, and of the files that the task maps.
    """
    logging.getLogger("lightship").addHandler(_LOG)
    logging.getLogger("lightship").setLevel(logging.INFO)
    control = socket.socket(fileno=descriptor)
    tasks: Connection = Connection(os.dup(descriptor))
    root, as_json = _or_exit(tasks.recv)
    streams.set_up()
    streams.show_foreign_text(as_json)
    learn(root)
    if storage.may_hand_over(root):
        storage.in_daemon(partial(importlib.import_module, "obstore.store"))
    else:
        storage.make_ready(root)
    scaling.kernel()  # loaded before there is a task: its owner still imports
    while True:
        data = _or_exit(tasks.recv_bytes)
        _, handed, _, _ = _or_exit(partial(socket.recv_fds, control, 1, _MAX_DESCRIPTORS))
        if not handed:
            os._exit(0)
        arguments = (Connection(handed[0]), handed[1:], data)
        Thread(target=_work, args=arguments, name="lightship-task", daemon=True).start()


def _or_exit(receive: Callable[[], Any]) -> Any:
    """What is received next; exits where the other end of the socket is closed."""
    try:
        return receive()
    except (EOFError, OSError):
        os._exit(0)  # threads may hang in storage


def _work(connection: Connection, handed: Sequence[int], data: bytes) -> None:
    """Make the task's batches: send a `Decoded` for each, None after the last, `LogLine`s between.

    Ends early when the other end of the connection is closed.

    Args:
        connection: Receives the numbers of slots that may be written again.
        handed: Descriptors, of the shared memory and of the files that the task maps.
        data: The pickled task.
    """
    free: SimpleQueue[int] = SimpleQueue()
    Thread(target=_listen, args=(connection, free), daemon=True).start()
    try:
        task: Task = pickle_with_files.loads(data, handed[1:])
        slots = SharedSlots(task.shape, task.threads, handed[0])
        slots.close()
        storage.adopt(task.manifest.root, task.access)
        _make_batches(connection, slots, free, task)
        connection.send(None)
    except ConnectionError:
        pass  # closed by the reader
    except LightshipError as error:
        _send_failure(connection, Failed(error.exit_name, str(error)))
    except BaseException:
        _send_failure(connection, Failed(None, traceback.format_exc()))
    finally:
        # An error in a future and its traceback hold each other, and all that its frames see: the
        # shared memory too. This process makes too little garbage to be cleared by itself.
        gc.collect()


def _send_failure(connection: Connection, failure: Failed) -> None:
    with contextlib.suppress(ConnectionError):  # closed by the reader
        connection.send(failure)


def _listen(connection: Connection, free: "SimpleQueue[int]") -> None:
    """Pass on which slots are free, and at the end that the reader has closed."""
    try:
        while True:
            free.put(connection.recv())
    except (EOFError, OSError):
        free.put(_NO_MORE)


def _make_batches(
    connection: Connection, slots: SharedSlots, free: "SimpleQueue[int]", task: Task
) -> None:
    for slot in range(task.slots):
        free.put(slot)
    outbox: Outbox = SimpleQueue()
    with _LOG.sent_to(outbox):
        decoder, fetcher = _Decoder(task, slots.decoding), _fetcher(task)
        delivery = storage.in_daemon(partial(_deliver, connection, outbox, free, fetcher))
        try:
            for fetched in fetcher:
                slot = free.get()
                if slot == _NO_MORE:
                    break
                outbox.put((fetched, slot, decoder.begin(fetched, slots.pixels[slot])))
        finally:
            outbox.put(None)
            wait([delivery])
            decoder.close()
            fetcher.close()
    delivery.result()


def _fetcher(task: Task) -> Fetcher:
    cache = None
    if task.cache_bytes and (of := task.manifest.content_key()) is not None:
        cache = BlockCache(storage.cache_path("blocks"), task.cache_bytes, of)
    return Fetcher(
        task.manifest,
        task.blocks,
        task.share,
        task.wanted,
        task.budget_bytes,
        task.mixed_bytes,
        cache,
    )


def _deliver(
    connection: Connection, outbox: Outbox, free: "SimpleQueue[int]", fetcher: Fetcher
) -> None:
    """Send what is put into `outbox`, a batch when it is decoded, until that is None."""
    try:
        while (item := outbox.get()) is not None:
            if isinstance(item, LogLine):
                connection.send(item)
                continue
            fetched, slot, parts = item
            bad = {row: error for part in parts for row, error in part.result().items()}
            fetcher.release(fetched)
            connection.send(Decoded(fetched.epoch, fetched.batch, slot, fetched.ids, bad))
    except BaseException:
        free.put(_NO_MORE)
        raise


class _LogSender(logging.Handler):
    """Sends what this process logs to the one that trains, between the newest task's batches."""

    def __init__(self) -> None:
        super().__init__()
        self._outboxes: list[Outbox] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record; drop it if no task is open."""
        for outbox in self._outboxes[-1:]:
            outbox.put(LogLine(record.name, record.levelno, self.format(record)))

    @contextlib.contextmanager
    def sent_to(self, outbox: Outbox) -> Iterator[None]:
        """Put records into a task's `outbox` while it is open."""
        self._outboxes.append(outbox)
        try:
            yield
        finally:
            self._outboxes.remove(outbox)


_LOG = _LogSender()


class _Decoder:
    """Turns the bytes of a batch into pixels, some rows a thread.

    Args:
        task: The batches.
        decoding: `SharedSlots.decoding`.
    """

    def __init__(self, task: Task, decoding: np.ndarray) -> None:
        self.task, self._thread = task, threading.local()
        # Not a method: the pool and its threads would hold this object, which holds them.
        start = partial(_take_row, self._thread, iter(decoding))
        self.pool = ThreadPoolExecutor(task.threads, "lightship-decode", start)

    def close(self) -> None:
        """Decode no more, and have the threads end, which keep the shared memory. Does not wait."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, fetched: FetchedBatch, out: np.ndarray) -> "list[Future[dict[int, DataError]]]":
        """Decode into `out` [B, S, S, 3] what comes, as it comes; blocks until all has come.

        Returns:
            Futures of the bad rows, for some rows each.
        """
        draws = self._draws(fetched)
        return [
            self.pool.submit(self._decode_rows, fetched, rows, draws, out)
            for rows in _in_pieces(fetched.samples)
        ]

    def _decode_rows(
        self,
        fetched: FetchedBatch,
        rows: list[tuple[int, Raw]],
        draws: tuple[np.ndarray, list[bool]],
        out: np.ndarray,
    ) -> dict[int, DataError]:
        boxes, flips = draws
        bad: dict[int, DataError] = {}
        for row, raw in rows:
            i = int(fetched.ids[row])
            if i == NOT_COUNTED:
                out[row] = 0
                continue
            pixels = self._decode(fetched.epoch, i, raw, boxes[row])
            if isinstance(pixels, DataError):
                out[row], bad[row] = 0, pixels
                continue
            if not flips[row]:
                out[row] = pixels
                continue
            for channel in range(3):  # four times as fast as whole pixels
                out[row, :, :, channel] = pixels[:, ::-1, channel]
        return bad

    def _decode(
        self, epoch: int, i: int, raw: Raw, box_draws: np.ndarray
    ) -> np.ndarray | DataError:
        """Of sample `i`, which the reader knows to be under way if this process dies of it."""
        if i in self.task.deadly:
            return DataError(self.task.deadly[i])
        raw = checked(self.task.manifest, i, raw)
        self._thread.decoding[:] = epoch, i
        pixels = self.task.decoder.decode(i, raw, box_draws)
        self._thread.decoding[:] = IDLE
        return pixels

    def _draws(self, fetched: FetchedBatch) -> tuple[np.ndarray, list[bool]]:
        """([B, 10, 4] in [0, 1), [B]) for boxes and mirrors: of seed, epoch and id alone."""
        task, ids = self.task, fetched.ids
        boxes: np.ndarray = np.zeros((len(ids), 0))
        flips = [False] * len(ids)
        if task.decoder.min_area:
            draws = uniform(ids, task.seed + _BOX_STREAM, fetched.epoch, _BOX_TRIES * 4)
            boxes = draws.reshape(len(ids), _BOX_TRIES, 4)
        if task.flip:
            flips = task.flip.mirrored(ids, fetched.epoch).tolist()
        return boxes, flips


def _take_row(thread: threading.local, unused: Iterator[np.ndarray]) -> None:
    """Give a new thread its row of `SharedSlots.decoding`."""
    thread.decoding = next(unused)


def _in_pieces(samples: Iterator[tuple[int, Raw]]) -> Iterator[list[tuple[int, Raw]]]:
    while piece := list(islice(samples, _ROWS_AT_ONCE)):
        yield piece
