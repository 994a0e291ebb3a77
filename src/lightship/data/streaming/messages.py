"""Messages between a rank and its data worker."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lightship import storage
from lightship.data.blocks import Blocks
from lightship.data.draws import Mirror
from lightship.data.manifest import Manifest
from lightship.data.sample_decoder import SampleDecoder
from lightship.data.streaming.prefetch import BatchRange, Share
from lightship.errors import DataError


@dataclass(frozen=True)
class Task:
    """The batches that a worker makes.

    Attributes:
        decoder: Of the split.
        blocks: Of the split.
        share: The rank's batches.
        wanted: Which of them to make.
        batch_size: Rows of each.
        flip: Says which images are mirrored; None: none.
        seed: The run's seed.
        threads: Decoding threads.
        slots: Batches that the shared memory holds.
        budget_bytes: Bound of the prefetched bytes.
        mixed_bytes: See `Fetcher`.
        cache_bytes: Size of the block cache; 0: none.
        deadly: Sample -> why it is bad undecoded: a worker died of it.
        access: How the storage is reached; None: the worker finds out.
    """

    decoder: SampleDecoder
    blocks: Blocks
    share: Share
    wanted: BatchRange
    batch_size: int
    flip: Mirror | None
    seed: int
    threads: int
    slots: int
    budget_bytes: int
    mixed_bytes: int
    cache_bytes: int
    deadly: Mapping[int, str] = field(default_factory=dict)
    access: storage.Access | None = None

    @property
    def manifest(self) -> Manifest:
        """The split."""
        return self.decoder.manifest

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the shared memory, uint8: [slots, B, S, S, 3]."""
        size_px = self.decoder.size_px
        assert size_px is not None
        return (self.slots, self.batch_size, size_px, size_px, 3)


@dataclass(frozen=True)
class Decoded:
    """A batch whose pixels lie in a slot.

    Attributes:
        epoch: Its epoch.
        batch: Its place in the epoch.
        slot: Number of the slot; the reader owns it until it sends the number back.
        ids: [B] int64, NOT_COUNTED in padding.
        bad: Row -> why there is no image (the row is black).
    """

    epoch: int
    batch: int
    slot: int
    ids: np.ndarray
    bad: dict[int, DataError]


@dataclass(frozen=True)
class LogLine:
    """A record that a logger of the worker has made.

    Attributes:
        logger: Its name.
        level: As in `logging`.
        text: The message.
    """

    logger: str
    level: int
    text: str


@dataclass(frozen=True)
class Failed:
    """The error that ended a task.

    Attributes:
        exit_name: Of a LightshipError; None: any other error.
        text: Its message; of any other error the traceback.
    """

    exit_name: str | None
    text: str
