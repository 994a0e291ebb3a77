"""Deaths of the data worker: which sample it died of, and how often it is started again.

A decoder is native code: a damaged image can end its process. The samples that were being decoded
then are suspects; they are decoded one by one in another process, and one that ends that as well is
bad. What killed the worker otherwise is not known: it is started again a few times.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection

import numpy as np

from lightship.data import bad_samples
from lightship.data.shares import ListedShare
from lightship.data.streaming.messages import Decoded, Failed, LogLine, Task
from lightship.data.streaming.prefetch import BatchRange
from lightship.data.streaming.worker_process import IDLE, Worker, WorkerDied
from lightship.errors import DataError, LightshipError, TimeoutExpired
from lightship.storage import Limits

logger = logging.getLogger(__name__)
_MAX_UNEXPLAINED, _FORGOTTEN_AFTER = 5, 100
"""Deaths that no sample explains, with fewer than so many batches between them."""
_MAX_DEADLY = 20


class Deaths:
    """The deaths of the worker over a split, in this process.

    Attributes:
        deadly: Sample -> why it is bad.
    """

    def __init__(self) -> None:
        self.deadly: dict[int, str] = {}
        self._unexplained = self._batches = 0

    def count_batch(self) -> None:
        """Note that a batch has come."""
        self._batches += 1
        if self._batches >= _FORGOTTEN_AFTER:
            self._unexplained = 0

    def explain(
        self, death: WorkerDied, task: Task, decoding: Iterable[Sequence[int]] | np.ndarray
    ) -> None:
        """Find out what a worker died of, so that another one can go on. Blocks.

        Args:
            death: How it ended.
            task: What it was doing.
            decoding: (epoch, id) of each sample that its threads were decoding (see `SharedSlots`).

        Raises:
            RuntimeError: No signal has ended it, or too many deaths stay unexplained.
            DataError: Too many samples were deadly.
        """
        if not death.is_killed:
            raise RuntimeError(f"the data worker {death}") from death
        suspects: dict[int, list[int]] = {}
        for epoch, i in decoding:
            if IDLE not in (epoch, i):
                suspects.setdefault(int(epoch), []).append(int(i))
        for epoch, ids in suspects.items():
            if (found := _decode_one_by_one(task, epoch, sorted(ids))) is not None:
                self._condemn(task, *found)
                return
        self._unexplained, self._batches = self._unexplained + 1, 0
        if self._unexplained > _MAX_UNEXPLAINED:
            raise RuntimeError(
                f"the data worker {death}, {self._unexplained} times in "
                f"{_FORGOTTEN_AFTER * _MAX_UNEXPLAINED} batches or fewer"
            ) from death
        logger.warning(
            f"the data worker {death}; it is started again "
            f"({_MAX_UNEXPLAINED - self._unexplained} restarts left)"
        )

    def _condemn(self, task: Task, i: int, death: WorkerDied) -> None:
        self.deadly[i] = f"the data worker {death} while decoding it, twice"
        why = bad_samples.reason(task.manifest, i, DataError(self.deadly[i]))
        logger.warning(f"{why}; the worker is started again without it")
        if len(self.deadly) > _MAX_DEADLY:
            raise DataError(
                f"{len(self.deadly)} images have killed the data worker, more than {_MAX_DEADLY}; "
                f"the last: {why}; remove them"
            )


def receive(connection: Connection, worker: Worker, task: Task) -> Decoded:
    """The next batch of a task. Blocks, within the storage's deadlines; logs what the worker logs.

    Raises:
        LightshipError: What ended the task.
        WorkerDied: The worker has ended.
    """
    limits = Limits.now()
    batch_bytes = task.manifest.size_bytes / len(task.manifest) * task.batch_size
    wait_s = 2 * limits.total_s + batch_bytes / limits.slowest_bytes_per_s
    while True:
        if not connection.poll(wait_s):
            raise TimeoutExpired(
                f"the data worker gave no batch within {wait_s:.0f} s "
                "(LIGHTSHIP_STORAGE_DEADLINE_S sets the bound)"
            )
        try:
            message = connection.recv()
        except (EOFError, ConnectionError):
            raise worker.death() from None
        if isinstance(message, LogLine):
            logging.getLogger(message.logger).log(message.level, message.text)
            continue
        if isinstance(message, Failed):
            if message.exit_name is None:
                raise RuntimeError(f"the data worker failed:\n{message.text}")
            is_of_data = message.exit_name == DataError.exit_name
            failure = (DataError if is_of_data else LightshipError)(message.text)
            failure.exit_name = message.exit_name
            raise failure
        assert isinstance(message, Decoded), "no batch is taken after the last"
        return message


def _decode_one_by_one(task: Task, epoch: int, ids: list[int]) -> tuple[int, WorkerDied] | None:
    """The first of `ids` that ends a process which decodes nothing but them, and how; or None."""
    one_by_one = replace(
        task,
        share=ListedShare(np.array(ids)[:, None]),
        wanted=BatchRange(epoch, 0, len(ids), epoch + 1),
        batch_size=1,
        threads=1,
        slots=1,
    )
    worker, decoding = Worker(task.manifest.root), np.array([[IDLE, IDLE]])
    try:
        connection, slots = worker.begin(one_by_one)
        decoding = slots.decoding
        for _ in ids:
            connection.send(receive(connection, worker, one_by_one).slot)
    except WorkerDied as death:
        _, i = decoding[0].tolist()
        return (i, death) if death.is_killed and i != IDLE else None
    except ConnectionError:
        pass  # all have been decoded, and the worker is done
    finally:
        worker.end()
    return None
