"""Loaders of a streamed split, whose batches a worker process makes ahead."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightship import devices
from lightship.data.augment import Augment
from lightship.data.bad_samples import BadSamples
from lightship.data.batch import NOT_COUNTED, Batch
from lightship.data.order import EvalShare, ListedShare, TrainShare
from lightship.data.sample_decoder import SampleDecoder
from lightship.data.streaming.messages import Decoded, Failed, LogLine, Task
from lightship.data.streaming.prefetch import BatchRange
from lightship.data.streaming.worker_process import Worker
from lightship.errors import LightshipError, TimeoutExpired
from lightship.storage import Limits

_SLOTS = 4


@dataclass(frozen=True)
class StreamedSplit:
    """A split that is read batch by batch.

    Attributes:
        decoder: Of the split; its size is known.
        threads: Decoding threads.
        budget_bytes: Bound of the prefetched bytes.
        cache_bytes: Size of the block cache; 0: none.
        bad: Counts the samples that cannot be read.
        device: Device of the batches.
    """

    decoder: SampleDecoder
    threads: int
    budget_bytes: int
    cache_bytes: int
    bad: BadSamples
    device: torch.device

    def task(
        self, share: TrainShare | EvalShare | ListedShare, wanted: BatchRange, mixed_bytes: int = 0
    ) -> Task:
        """Whole images of a rank's share."""
        return Task(
            self.decoder,
            self.decoder.manifest.block_edges(),
            share,
            wanted,
            share.batch_size,
            flip=None,
            seed=0,
            threads=self.threads,
            slots=_SLOTS,
            budget_bytes=self.budget_bytes,
            mixed_bytes=mixed_bytes,
            cache_bytes=self.cache_bytes,
        )


class StreamedTrainLoader:
    """Endless training batches; the trainer keeps the position.

    Args:
        split: The training split.
        share: This rank's batches.
        augment: Applied to each batch on the device.
        min_area: Min share of an image in its random box (see `resize.random_box`); 0: no boxes.
        wanted: Gives the position of the next batch and the end of the run. Called for every batch;
            a position that does not follow the last one restarts the reading there.
    """

    def __init__(
        self,
        split: StreamedSplit,
        share: TrainShare,
        augment: Augment,
        min_area: float,
        wanted: Callable[[], BatchRange],
    ) -> None:
        self.split, self.share, self.min_area, self.wanted = split, share, min_area, wanted
        # On a CPU mirroring in a batch costs half as much as decoding; in the worker nothing.
        self.flip = augment if augment.flip and not augment.crop_padding_px else None
        self.augment = replace(augment, flip=False) if self.flip else augment
        self._stream: _Stream | None = None

    def __len__(self) -> int:
        return len(self.share)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            wanted = self.wanted()
            batch = self._at(wanted)
            yield self.augment(batch, wanted.epoch)

    def close(self) -> None:
        """Stop prefetching."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _at(self, wanted: BatchRange) -> Batch:
        if self._stream is not None and self._stream.following != (wanted.epoch, wanted.batch):
            self.close()
        if self._stream is None:
            order = self.share.order
            mixed_bytes = order.mixed_bytes // self.share.world_size
            task = self.split.task(self.share, wanted, mixed_bytes)
            decoder = replace(task.decoder, min_area=self.min_area)
            task = replace(task, decoder=decoder, flip=self.flip, seed=order.seed)
            self._stream = _Stream(task, self.split)
        return self._stream.take()


class StreamedEvalLoader:
    """Every sample of a split exactly once over all ranks (see `EvalShare`)."""

    def __init__(self, split: StreamedSplit, share: EvalShare | ListedShare) -> None:
        self.split, self.share = split, share

    def __len__(self) -> int:
        return len(self.share)

    def __iter__(self) -> Iterator[Batch]:
        wanted = BatchRange(epoch=0, batch=0, batches_per_epoch=len(self), epochs=1)
        stream = _Stream(self.split.task(self.share, wanted), self.split)
        try:
            for _ in range(len(self)):
                yield stream.take()
        finally:
            stream.close()


class _Stream:
    """One worker and the batches it makes, in order."""

    def __init__(self, task: Task, split: StreamedSplit) -> None:
        self.task, self.split = task, split
        self.following = task.wanted.epoch, task.wanted.batch
        self.worker = Worker.start(task.manifest.root)
        self.connection, slots = self.worker.begin(task)
        self.slots = torch.from_numpy(slots.pixels)
        self.uploads = devices.of(split.device).uploads(self.slots)
        self._labels = torch.from_numpy(task.manifest.label)
        # Slots being copied, oldest first, each with its event.
        self._lent: deque[tuple[int, Any]] = deque()

    def take(self) -> Batch:
        """The next batch, on the device. Blocks, within the storage's deadlines.

        Its pixels stay as they are until the next call.

        Raises:
            LightshipError: What ended the worker, or a sample that may not be bad.
        """
        self._give_back()
        message = self._receive()
        for row, error in message.bad.items():
            self.split.bad.add(int(message.ids[row]), error)
        epoch, place = self.following
        assert (message.epoch, message.batch) == (epoch, place), "batches come in order"
        is_last = place + 1 == self.task.wanted.batches_per_epoch
        self.following = (epoch + 1, 0) if is_last else (epoch, place + 1)

        ids = torch.from_numpy(message.ids)
        labels = torch.where(ids < 0, NOT_COUNTED, self._labels[ids.clamp(min=0)])
        labels[list(message.bad)] = NOT_COUNTED
        (pixels, labels, ids), copied = self.uploads.begin(self.slots[message.slot], labels, ids)
        self._lent.append((message.slot, copied))
        return Batch(pixels.permute(0, 3, 1, 2), labels, ids)

    def close(self) -> None:
        """End the task of the worker."""
        self.connection.close()
        self.uploads.close()
        self.worker.task_is_over()

    def _give_back(self) -> None:
        """Return the slots whose copy is done; wait for the oldest if the worker has none left."""
        while self._lent:
            slot, copied = self._lent[0]
            if copied is not None and not copied.query():
                if len(self._lent) < self.task.slots:
                    return
                copied.synchronize()
            self._lent.popleft()
            try:
                self.connection.send(slot)
            except ConnectionError:
                return  # it has made the last batch, or failed: `_receive` tells

    def _receive(self) -> Decoded:
        limits = Limits.now()
        batch_bytes = float(self.task.manifest.length.mean()) * self.task.batch_size
        wait_s = 2 * limits.total_s + batch_bytes / limits.slowest_bytes_per_s
        message: Any = None
        while message is None or isinstance(message, LogLine):
            if message is not None:
                logging.getLogger(message.logger).log(message.level, message.text)
            if not self.connection.poll(wait_s):
                raise TimeoutExpired(
                    f"the data worker gave no batch within {wait_s:.0f} s "
                    "(LIGHTSHIP_STORAGE_DEADLINE_S sets the bound)"
                )
            try:
                message = self.connection.recv()
            except (EOFError, ConnectionError):
                raise RuntimeError(self.worker.how_it_ended()) from None
        if isinstance(message, Failed):
            if message.exit_name is None:
                raise RuntimeError(f"the data worker failed:\n{message.text}")
            failure = LightshipError(message.text)
            failure.exit_name = message.exit_name
            raise failure
        assert isinstance(message, Decoded), "no batch is taken after the last"
        return message
