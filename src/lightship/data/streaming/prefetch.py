"""Prefetch: the bytes of coming batches, read ahead in blocks within a memory budget."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any, NamedTuple, Protocol

import numpy as np

from lightship import storage
from lightship.data.batch import NOT_COUNTED
from lightship.data.blocks import Blocks
from lightship.data.manifest import Manifest
from lightship.data.sample_reader import Raw, plan_spans, read_samples, samples_of
from lightship.data.streaming.cache import BlockCache, CachedReads
from lightship.errors import LightshipError
from lightship.storage import ReadAhead

_MAX_AHEAD = 16
_HORIZON_SHARE = 0.5
_MAX_ROW_GROUPS = 4


class Share(Protocol):
    """One rank's batches (`TrainShare`, `EvalShare`)."""

    def __len__(self) -> int: ...

    @property
    def batch_size(self) -> int:
        """Rows of each batch."""
        ...

    def batches(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Ids of batches, [stop - start, batch_size] int64, NOT_COUNTED in padding."""
        ...

    def batches_of(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """In which batch of an epoch each sample comes, [M] int64; -1: in none of this rank's."""
        ...


@dataclass(frozen=True)
class BatchRange:
    """Which of a share's batches are wanted.

    Attributes:
        epoch: The epoch of the first.
        batch: Its place in the epoch.
        batches_per_epoch: Batches taken from each epoch.
        epochs: The first epoch that is not wanted; None: there is no end.
    """

    epoch: int
    batch: int
    batches_per_epoch: int
    epochs: int | None


@dataclass
class FetchedBatch:
    """The bytes of one batch, some of which may still be in flight.

    Attributes:
        epoch: Its epoch.
        batch: Its place in the epoch.
        ids: [B] int64, NOT_COUNTED in padding.
        samples: (row, bytes or error, unchecked; b"" in padding) of each row once, as they arrive.
            Exhausted before the next batch is requested. Blocks; raises LightshipError if the
            storage fails.
        frees_bytes: Bytes to release once the batch is decoded; known when `samples` is exhausted.
    """

    epoch: int
    batch: int
    ids: np.ndarray
    samples: Iterator[tuple[int, Raw]]
    frees_bytes: int = 0


@dataclass
class _Request:
    """One read, shared by the samples it brings."""

    run: np.ndarray
    start: int
    """First byte of the read in its file."""
    size_bytes: int
    future: Future[Any]
    samples: dict[int, Raw] | None = None


@dataclass
class _Epoch:
    """What has been asked for of one epoch's batches."""

    number: int
    planned: dict[int, tuple[storage.Span | None, np.ndarray]] = field(default_factory=dict)
    requests: dict[int, _Request] = field(default_factory=dict)


class _Ahead(NamedTuple):
    """A batch that is read ahead."""

    epoch: _Epoch
    batch: int
    ids: np.ndarray


class Fetcher:
    """The bytes of a rank's batches, in order.

    Prefetch depth starts at one batch and grows by one per stall, up to 16. A request for a sample
    also brings those samples of its block that this rank needs later in the epoch, which are kept
    until then; if the budget does not allow that, only those of the nearer batches (more requests,
    not more memory). When a run resumes in the middle of an epoch, the samples of its first batch
    are read alone, so that it comes as soon as at the start of an epoch. Used by one thread, in the
    process that decodes; blocks on storage.

    Args:
        manifest: The split; its container is "bytes" or "parquet".
        blocks: Its blocks (see `Manifest.blocks`).
        share: This rank's batches.
        wanted: Which of them to fetch.
        budget_bytes: Bound of the bytes held, from request to decoding; one batch may exceed it.
        mixed_bytes: Bytes that this rank would hold if blocks were always read whole.
        cache: Looked up before the storage; blocks are then read whole, for all ranks.
    """

    def __init__(
        self,
        manifest: Manifest,
        blocks: Blocks,
        share: Share,
        wanted: BatchRange,
        budget_bytes: int,
        mixed_bytes: int,
        cache: BlockCache | None = None,
    ) -> None:
        self.manifest, self.share, self.wanted = manifest, share, wanted
        self.budget_bytes = budget_bytes
        self.held_bytes = 0
        self._lock = Lock()
        self._blocks = blocks
        cache = None if cache is None or cache.is_off else cache
        self._reads_whole = cache is not None
        self._reads: ReadAhead | CachedReads = ReadAhead()
        if cache is not None:
            self._reads = CachedReads(self._reads, cache)
        self._rows: storage.Executor | None = None
        if manifest.container == "parquet":
            self._rows = storage.Executor(_MAX_ROW_GROUPS, name="lightship-rows")
        self._horizon: int | None = None  # in batches; None: to the epoch's end
        if mixed_bytes > budget_bytes:
            batch_bytes = manifest.size_bytes / len(manifest) * share.batch_size
            self._horizon = int(_HORIZON_SHARE * budget_bytes / max(1.0, batch_bytes))

    def __iter__(self) -> Iterator[FetchedBatch]:
        ahead: deque[_Ahead] = deque()
        upcoming = self._upcoming()
        depth = 1
        while True:
            while len(ahead) < depth and (not ahead or self.held_bytes < self.budget_bytes):
                following = next(upcoming, None)
                if following is None:
                    break
                ahead.append(following)
                self._ask(following)
            if not ahead:
                return
            if not self._is_there(ahead[0]):
                depth = min(depth + 1, _MAX_AHEAD)
            yield self._take(ahead.popleft())

    def release(self, fetched: FetchedBatch) -> None:
        """Free the bytes of a decoded batch. Any thread."""
        with self._lock:
            self.held_bytes -= fetched.frees_bytes

    def close(self) -> None:
        """Cancel the reads that have not begun."""
        self._reads.close()
        if self._rows is not None:
            self._rows.close()

    def _upcoming(self) -> Iterator[_Ahead]:
        wanted, number, first = self.wanted, self.wanted.epoch, self.wanted.batch
        while wanted.epochs is None or number < wanted.epochs:
            epoch = _Epoch(number)
            for batch in range(first, min(wanted.batches_per_epoch, len(self.share))):
                yield _Ahead(epoch, batch, self.share.batches(number, batch, batch + 1)[0])
            number, first = number + 1, 0

    def _ask(self, ahead: _Ahead) -> None:
        epoch, batch = ahead.epoch, ahead.batch
        for i in ahead.ids.tolist():
            if i == NOT_COUNTED or i in epoch.requests:
                continue
            if i not in epoch.planned:
                self._plan_block(epoch, batch, i)
            span, run = epoch.planned[i]
            request = self._begin(span, run)
            with self._lock:
                self.held_bytes += request.size_bytes
            for j in run.tolist():
                del epoch.planned[j]
                epoch.requests[j] = request

    def _plan_block(self, epoch: _Epoch, batch: int, i: int) -> None:
        """Cut what is still wanted of the block of sample `i` into requests."""
        ids = np.arange(*self._blocks.around(i))
        place = self.share.batches_of(epoch.number, ids)
        wanted = (place >= batch) & (place < self.wanted.batches_per_epoch)
        horizon = self._horizon
        if (epoch.number, batch) == (self.wanted.epoch, self.wanted.batch) and batch:
            horizon = 0 if self._rows is None and not self._reads_whole else horizon
        if horizon is not None:
            wanted &= place <= batch + horizon
        new = {
            j for j in ids[wanted].tolist() if j not in epoch.requests and j not in epoch.planned
        }
        if not self._reads_whole:
            ids = np.array(sorted(new), dtype=np.int64)
        manifest = self.manifest
        ids = ids[np.lexsort((manifest.offset[ids], manifest.file_index[ids]))]
        gap_samples = 2 if horizon is None else 0
        runs: Iterable[tuple[storage.Span | None, np.ndarray]] = [(None, ids)]
        if self._rows is None:
            runs = plan_spans(manifest, ids, gap_samples)
        for span, everything in runs:
            run = np.array([j for j in everything.tolist() if j in new], dtype=np.int64)
            epoch.planned.update(dict.fromkeys(run.tolist(), (span, run)))

    def _begin(self, span: storage.Span | None, run: np.ndarray) -> _Request:
        if span is None:
            assert self._rows is not None
            size_bytes = int(self.manifest.length[run].sum())
            return _Request(
                run, 0, size_bytes, self._rows.submit(partial(self._read_one_by_one, run))
            )
        assert span.end is not None
        return _Request(run, span.start, span.end - span.start, self._reads.begin(span))

    def _read_one_by_one(self, run: np.ndarray) -> dict[int, Raw]:
        return dict(read_samples(self.manifest, run))

    def _is_there(self, ahead: _Ahead) -> bool:
        """Whether all reads of a requested batch are done."""
        requests = ahead.epoch.requests
        return all(i == NOT_COUNTED or requests[i].future.done() for i in ahead.ids.tolist())

    def _take(self, ahead: _Ahead) -> FetchedBatch:
        """A requested batch. Does not block; its samples do."""
        fetched = FetchedBatch(ahead.epoch.number, ahead.batch, ahead.ids, iter(()))
        fetched.samples = self._as_they_come(ahead.epoch, fetched)
        return fetched

    def _as_they_come(self, epoch: _Epoch, fetched: FetchedBatch) -> Iterator[tuple[int, Raw]]:
        """Samples in the order of arrival, so that the first are decoded while others arrive."""
        rows: dict[Future[Any], list[tuple[int, int, _Request]]] = {}
        for row, i in enumerate(fetched.ids.tolist()):
            if i == NOT_COUNTED:
                yield row, b""
                continue
            request = epoch.requests.pop(i)
            rows.setdefault(request.future, []).append((row, i, request))
        for future in (self._rows or self._reads).as_completed(rows):
            for row, i, request in rows[future]:
                if request.samples is None:
                    request.samples = self._samples(request)
                sample = request.samples.pop(i)
                if not request.samples:
                    fetched.frees_bytes += request.size_bytes
                yield row, sample

    def _samples(self, request: _Request) -> dict[int, Raw]:
        """What a request has brought. Blocks where it failed and its samples are read alone.

        Raises:
            LightshipError: The storage fails, which is no sample's fault.
        """
        if self._rows is not None:
            return request.future.result()
        got: storage.Data | Exception
        try:
            got = self._reads.result(request.future)
        except LightshipError as error:
            if storage.is_file_error(error) and len(request.run) > 1:
                return self._read_one_by_one(request.run)  # a file is cut or gone: whose samples?
            got = error
        return dict(samples_of(self.manifest, request.run, request.start, got))
