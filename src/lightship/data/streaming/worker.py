"""The worker: a rank's process that fetches and decodes batches into shared memory.

One process a rank, so that no block is fetched twice; its threads decode, since the decoders
release the GIL. It runs `main`, which accepts tasks (from worker_process.py) and runs each in its
own threads, side by side.
"""

import contextlib
import logging
import os
import socket
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread

import numpy as np
import torch

from lightship import storage
from lightship.data.augment import uniform
from lightship.data.batch import NOT_COUNTED
from lightship.data.sample_reader import Raw, checked
from lightship.data.streaming.cache import BlockCache
from lightship.data.streaming.messages import Decoded, Failed, LogLine, Task
from lightship.data.streaming.prefetch import FetchedBatch, Fetcher
from lightship.data.streaming.worker_process import SharedSlots
from lightship.errors import DataError, LightshipError

_ROWS_AT_ONCE = 8
_NO_MORE = -1
_BOX_TRIES, _BOX_STREAM = 10, 2**31  # a seed that no run's own draws use

Outbox = SimpleQueue[tuple[FetchedBatch, int, list[Future]] | LogLine | None]
"""(batch, its slot, its pieces being decoded), and lines, in the order they are sent; None: end."""


def main(descriptor: int) -> None:
    """Run the tasks that arrive on a socket until its other end is closed; then exit.

    Tasks run side by side, so none may change the environment.

    Args:
        descriptor: Of the socket. It carries a URL that will be read, then pickled tasks, each
            followed by a byte with two descriptors: of the task's own connection, and of the
            shared memory.
    """
    torch.set_num_threads(1)
    logging.getLogger("lightship").addHandler(_LOG)
    logging.getLogger("lightship").setLevel(logging.INFO)
    control = socket.socket(fileno=descriptor)
    tasks: Connection = Connection(os.dup(descriptor))
    try:
        storage.make_ready(tasks.recv())
        while True:
            task = tasks.recv()
            _, handed, _, _ = socket.recv_fds(control, 1, 2)
            slots = SharedSlots(task.shape, handed[1])
            slots.close()
            arguments = (Connection(handed[0]), slots.pixels, task)
            Thread(target=_work, args=arguments, name="lightship-task", daemon=True).start()
    except (EOFError, OSError):
        os._exit(0)  # threads may hang in storage


def _work(connection: Connection, slots: np.ndarray, task: Task) -> None:
    """Make the task's batches: send a `Decoded` for each, None after the last, `LogLine`s between.

    Ends early when the other end of the connection is closed.

    Args:
        connection: Receives the numbers of slots that may be written again.
        slots: [slots, B, S, S, 3] uint8, which takes the pixels.
        task: The batches.
    """
    free: SimpleQueue[int] = SimpleQueue()
    Thread(target=_listen, args=(connection, free), daemon=True).start()
    try:
        _make_batches(connection, slots, free, task)
        connection.send(None)
    except ConnectionError:
        pass  # closed by the reader
    except LightshipError as error:
        _send_failure(connection, Failed(error.exit_name, str(error)))
    except BaseException:
        _send_failure(connection, Failed(None, traceback.format_exc()))


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
    connection: Connection, slots: np.ndarray, free: "SimpleQueue[int]", task: Task
) -> None:
    for slot in range(task.slots):
        free.put(slot)
    outbox: Outbox = SimpleQueue()
    with _LOG.sent_to(outbox):
        decoder, fetcher = _Decoder(task), _fetcher(task)
        delivery = storage.in_daemon(partial(_deliver, connection, outbox, free, fetcher))
        try:
            for fetched in fetcher:
                slot = free.get()
                if slot == _NO_MORE:
                    break
                outbox.put((fetched, slot, decoder.begin(fetched, slots[slot])))
        finally:
            outbox.put(None)
            wait([delivery])
            fetcher.close()
    delivery.result()


def _fetcher(task: Task) -> Fetcher:
    cache = None
    if task.cache_bytes:
        of = task.manifest.fingerprint()
        cache = BlockCache(storage.cache_path("blocks"), task.cache_bytes, of)
    return Fetcher(
        task.manifest,
        task.block_edges,
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
    """Turns the bytes of a batch into pixels, some rows a thread."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.pool = ThreadPoolExecutor(task.threads, "lightship-decode")

    def begin(self, fetched: FetchedBatch, out: np.ndarray) -> "list[Future[dict[int, DataError]]]":
        """Decode into `out` [B, S, S, 3] what comes, as it comes; blocks until all has come.

        Returns:
            Futures of the bad rows, for some rows each.
        """
        draws = self._draws(fetched)
        return [
            self.pool.submit(self._decode_rows, fetched.ids, rows, draws, out)
            for rows in _in_pieces(fetched.samples)
        ]

    def _decode_rows(
        self,
        ids: np.ndarray,
        rows: list[tuple[int, Raw]],
        draws: tuple[np.ndarray, list[bool]],
        out: np.ndarray,
    ) -> dict[int, DataError]:
        boxes, flips = draws
        bad: dict[int, DataError] = {}
        for row, raw in rows:
            i = int(ids[row])
            if i == NOT_COUNTED:
                out[row] = 0
                continue
            raw = checked(self.task.manifest, i, raw)
            pixels = self.task.decoder.decode(i, raw, boxes[row])
            if isinstance(pixels, DataError):
                out[row], bad[row] = 0, pixels
                continue
            out[row] = pixels
            if flips[row]:  # by torch: NumPy takes ten times as long to copy pixels backwards
                out[row] = torch.from_numpy(out[row]).flip(1).numpy()
        return bad

    def _draws(self, fetched: FetchedBatch) -> tuple[np.ndarray, list[bool]]:
        """([B, 10, 4] in [0, 1), [B]) for boxes and mirrors: of seed, epoch and id alone."""
        task, ids = self.task, torch.from_numpy(fetched.ids)
        boxes, flips = np.zeros((len(ids), 0)), [False] * len(ids)
        if task.decoder.min_area:
            draws = uniform(ids, task.seed + _BOX_STREAM, fetched.epoch, _BOX_TRIES * 4)
            boxes = draws.view(len(ids), _BOX_TRIES, 4).numpy()
        if task.flip:
            flips = task.flip.mirrored(ids, fetched.epoch).tolist()
        return boxes, flips


def _in_pieces(samples: Iterator[tuple[int, Raw]]) -> Iterator[list[tuple[int, Raw]]]:
    while piece := list(islice(samples, _ROWS_AT_ONCE)):
        yield piece
