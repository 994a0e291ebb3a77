"""What a rank and its data worker send each other."""

from dataclasses import dataclass

import numpy as np

from lightship.data.augment import Augment
from lightship.data.manifest import Manifest
from lightship.data.sample_decoder import SampleDecoder
from lightship.data.streaming.prefetch import BatchRange, Share
from lightship.errors import DataError


@dataclass(frozen=True)
class Task:
    """What a worker makes.

    Attributes:
        decoder: Of the split.
        block_edges: Blocks of the split.
        share: The rank's batches.
        wanted: Which of them.
        batch_size: Rows of each.
        flip: Mirrors those images that it would mirror, and does no more; None: nothing.
        seed: The run's.
        threads: That decode.
        slots: Batches that the shared memory holds.
        budget_bytes: Bound of what is read ahead.
        mixed_bytes: See `Fetcher`.
        cache_bytes: Of the block cache; 0: none.
    """

    decoder: SampleDecoder
    block_edges: np.ndarray
    share: Share
    wanted: BatchRange
    batch_size: int
    flip: Augment | None
    seed: int
    threads: int
    slots: int
    budget_bytes: int
    mixed_bytes: int
    cache_bytes: int

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
    """Word of one batch whose pixels lie in a slot.

    Attributes:
        epoch: Its epoch.
        batch: Its place in the epoch.
        slot: Where; it is the reader's until that sends the number back.
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
    """Word of what ended the worker: a LightshipError by name, else (None) a trace."""

    exit_name: str | None
    text: str
