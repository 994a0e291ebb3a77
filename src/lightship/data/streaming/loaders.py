"""Loaders of a streamed split, whose batches a worker process makes ahead."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from lightship import devices, storage
from lightship.data.augment import Augment
from lightship.data.bad_samples import BadSamples
from lightship.data.batch import NOT_COUNTED, Batch
from lightship.data.draws import Mirror
from lightship.data.sample_decoder import SampleDecoder
from lightship.data.shares import EvalShare, ListedShare, TrainShare
from lightship.data.size_schedule import SizeSchedule
from lightship.data.streaming.deaths import Deaths, receive
from lightship.data.streaming.messages import Decoded, Task
from lightship.data.streaming.prefetch import BatchRange
from lightship.data.streaming.worker_process import Worker, WorkerDied

_SLOTS = 4
_READ_BYTES = 16 * 2**20  # of decoded images in a batch of `read_all`


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
        deaths: Of the worker.
    """

    decoder: SampleDecoder
    threads: int
    budget_bytes: int
    cache_bytes: int
    bad: BadSamples
    device: torch.device
    deaths: Deaths = field(default_factory=Deaths)

    def task(
        self, share: TrainShare | EvalShare | ListedShare, wanted: BatchRange, mixed_bytes: int = 0
    ) -> Task:
        """Whole images of a rank's share."""
        return Task(
            self.decoder,
            self.decoder.manifest.blocks(),
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
        sizes: The side of the images in each epoch; None: that of the split.
    """

    def __init__(
        self,
        split: StreamedSplit,
        share: TrainShare,
        augment: Augment,
        min_area: float,
        wanted: Callable[[], BatchRange],
        sizes: SizeSchedule | None = None,
    ) -> None:
        self.split, self.share, self.min_area, self.wanted = split, share, min_area, wanted
        self.sizes = sizes
        # On a CPU mirroring in a batch costs half as much as decoding; in the worker nothing.
        self.flip: Mirror | None = None
        if augment.flip and not augment.crop_padding_px:
            self.flip = Mirror(augment.seed, augment.flip_in_turn)
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
        if self._stream is not None and not self._stream.is_next(wanted.epoch, wanted.batch):
            self.close()
        if self._stream is None:
            order = self.share.order
            mixed_bytes = order.mixed_bytes // self.share.world_size
            task = self.split.task(self.share, wanted, mixed_bytes)
            decoder = replace(task.decoder, min_area=self.min_area)
            if self.sizes is not None:
                end = self.sizes.end_of_size(wanted.epoch)
                decoder = replace(decoder, size_px=self.sizes.at(wanted.epoch))
                task = replace(task, wanted=replace(wanted, epochs=end))
            blocks = order.blocks or task.blocks
            task = replace(task, decoder=decoder, blocks=blocks, flip=self.flip, seed=order.seed)
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


def read_all(split: StreamedSplit, ids: np.ndarray) -> np.ndarray:
    """Samples decoded by the worker, in the order in which they lie. Blocks.

    Args:
        split: Its device is the CPU.
        ids: [K] which samples, each once.

    Returns:
        [K, S, S, 3] uint8 in the order of `ids`; black where bad, which `split.bad` counts.

    Raises:
        LightshipError: See `_Stream.take`.
    """
    manifest, size_px = split.decoder.manifest, split.decoder.size_px
    assert size_px is not None
    order = np.lexsort((manifest.offset[ids], manifest.file_index[ids]))
    batch_size = max(1, min(len(ids), _READ_BYTES // (3 * size_px * size_px)))
    rows = np.full((-(-len(ids) // batch_size), batch_size), NOT_COUNTED, dtype=np.int64)
    rows.flat[: len(ids)] = ids[order]
    images = np.empty((len(ids), size_px, size_px, 3), dtype=np.uint8)
    for number, batch in enumerate(StreamedEvalLoader(split, ListedShare(rows))):
        places = order[number * batch_size : (number + 1) * batch_size]
        images[places] = batch.images.permute(0, 2, 3, 1).numpy()[: len(places)]
    return images


class _Stream:
    """One worker and the batches it makes, in order."""

    def __init__(self, task: Task, split: StreamedSplit) -> None:
        self.task, self.split = task, split
        self.following = task.wanted.epoch, task.wanted.batch
        self._begin()

    def _begin(self) -> None:
        """Have the worker make what follows."""
        epoch, batch = self.following
        wanted = replace(self.task.wanted, epoch=epoch, batch=batch)
        task = replace(
            self.task,
            wanted=wanted,
            deadly=dict(self.split.deaths.deadly),
            access=storage.access(self.task.manifest.root),
        )
        slots = None
        while slots is None:
            self.worker = Worker.start(task.manifest.root)
            try:
                self.connection, slots = self.worker.begin(task)
            except WorkerDied as death:
                self.split.deaths.explain(death, task, decoding=[])
        self.slots, self.decoding = torch.from_numpy(slots.pixels), slots.decoding
        self.uploads = devices.of(self.split.device).uploads(self.slots)
        # Slots being copied, oldest first, each with its event.
        self._lent: deque[tuple[int, Any]] = deque()

    def is_next(self, epoch: int, batch: int) -> bool:
        """Whether it makes a batch, and that one next."""
        epochs = self.task.wanted.epochs
        return self.following == (epoch, batch) and (epochs is None or epoch < epochs)

    def _receive(self) -> Decoded:
        """The next batch, made again, bit for bit the same, if the worker has died of a signal."""
        deaths = self.split.deaths
        while True:
            try:
                message = receive(self.connection, self.worker, self.task)
            except WorkerDied as death:
                self.close()
                deaths.explain(death, self.task, self.decoding)
                self._begin()
            else:
                deaths.count_batch()
                return message

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

        known = self.task.manifest.label[np.maximum(message.ids, 0)].astype(np.int64)
        known[message.ids < 0] = NOT_COUNTED
        known[list(message.bad)] = NOT_COUNTED
        ids, labels = torch.from_numpy(message.ids), torch.from_numpy(known)
        (pixels, labels, ids), copied = self.uploads.begin(self.slots[message.slot], labels, ids)
        self._lent.append((message.slot, copied))
        return Batch(pixels.permute(0, 3, 1, 2), labels, ids)

    def close(self) -> None:
        """End the task of the worker, once."""
        if self.connection.closed:
            return
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
                return  # it has made the last batch, or has ended: `_receive` tells
