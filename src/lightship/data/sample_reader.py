"""The bytes of samples: many fetched at once, checked, in any order."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TypeVar

import numpy as np

from lightship import storage
from lightship.data.checksum import crc32
from lightship.data.manifest import Manifest
from lightship.data.sources.gzip_file import Unpacked
from lightship.data.sources.parquet_file import RowReader
from lightship.errors import DataError, LightshipError

_GROUP_BYTES, _GROUP_SAMPLES = 32 * 2**20, 4096
_SPAN_BYTES = 8 * 2**20  # a block (4 MiB) whole, with gaps
_GAP_BYTES = 16 * 2**10  # reading over a tar header costs less than another request

Sample = bytes | DataError
Raw = bytes | memoryview | DataError
"""The bytes of one sample, or why there are none."""
_Raw = TypeVar("_Raw", bound=Raw)


def read_samples(
    manifest: Manifest, ids: Sequence[int] | np.ndarray
) -> Iterator[tuple[int, Sample]]:
    """The bytes of samples, in the order of `ids`; many are fetched at once.

    Groups of at most 32 MiB are fetched when their first sample is asked for. In a group, samples
    that lie close together in a file are one request (of up to 8 MiB); a gzipped file is unpacked
    and a Parquet row group decoded once and kept until another one is needed. Any rank; blocks.

    Args:
        manifest: The split.
        ids: [M] integers below len(manifest).

    Yields:
        (id, bytes), or (id, DataError) for a sample that is empty, truncated, gone, that nobody
        may read, or whose checksum differs.

    Raises:
        LightshipError: The storage fails (bad credentials, deadline), which is no sample's fault.
    """
    ids = np.asarray(ids, dtype=np.int64)
    reader = _Ranges(manifest) if manifest.container == "bytes" else _OneFileAtATime(manifest)
    with closing(reader):
        for group in _groups(manifest.length[ids]):
            chosen = ids[group]
            in_place = np.lexsort((manifest.offset[chosen], manifest.file_index[chosen]))
            data: list[Sample] = [b""] * len(chosen)
            for where, got in zip(in_place, reader.read(chosen[in_place]), strict=True):
                data[where] = checked(manifest, int(chosen[where]), got)
            yield from zip(chosen.tolist(), data, strict=True)


def _groups(lengths: np.ndarray) -> Iterator[slice]:
    start, size = 0, 0
    for end, length in enumerate(lengths.tolist()):
        if end > start and (size + length > _GROUP_BYTES or end - start == _GROUP_SAMPLES):
            yield slice(start, end)
            start, size = end, 0
        size += length
    if start < len(lengths):
        yield slice(start, len(lengths))


def checked(manifest: Manifest, i: int, data: _Raw) -> _Raw | DataError:
    """Sample `i`, or why `data` is not all of it: empty, or of another checksum."""
    if isinstance(data, DataError):
        return data
    if error := too_large(manifest, i, len(data)):
        return error
    if not data:
        return DataError(f"{manifest.name(i)} is empty (0 bytes)")
    known = int(manifest.crc32[i])
    if known >= 0 and (found := crc32(data)) != known:
        return DataError(f"{manifest.name(i)}: checksum {found:08x}, not {known:08x}")
    return data


def too_large(manifest: Manifest, i: int, got_bytes: int = 0) -> DataError | None:
    """Why sample `i` is not read, or not used, if it has more bytes than a sample may have."""
    is_known = manifest.container != "parquet"  # whose lengths are estimates
    size = max(int(manifest.length[i]) if is_known else 0, got_bytes)
    if size <= manifest.max_sample_bytes:
        return None
    return DataError(
        f"{manifest.name(i)} has {size} bytes, more than --data.max_sample_mib "
        f"{manifest.max_sample_bytes / 2**20:.4g} allows: remove it, or raise that flag (lightship "
        "pack: --max_sample_mib)"
    )


def _sample_error(manifest: Manifest, i: int, error: Exception) -> DataError:
    """The error as one sample's, with its exit code; one that is no sample's fault is raised on."""
    if not (isinstance(error, LightshipError) and storage.is_file_error(error)):
        raise error
    of_sample = DataError(f"{manifest.name(i)}: {error}")
    of_sample.exit_name = error.exit_name
    return of_sample


def plan_spans(
    manifest: Manifest, ids: np.ndarray, gap_samples: int = 2
) -> list[tuple[storage.Span, np.ndarray]]:
    """The requests for samples that are ranges of stored bytes.

    Args:
        manifest: The split (container "bytes").
        ids: [M] int64, sorted by file and offset.
        gap_samples: How many images (such as those held out) may be read over to save a request.

    Returns:
        (bytes to read, ids in them): neighbours share a request of at most 8 MiB; small gaps, such
        as a tar's headers, are always read over. Of a sample that is too large nothing is read.
    """
    columns = (manifest.file_index[ids], manifest.offset[ids], _read_bytes(manifest, ids))
    spans: list[tuple[storage.Span, np.ndarray]] = []
    first = run_start = run_end = 0
    last_file = -1

    def close(end: int) -> None:
        if end > first:
            url = manifest.url(last_file)
            spans.append((storage.Span(url, run_start, run_end), ids[first:end]))

    for place, (file, start, length) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        end = start + length
        joins = file == last_file and start - run_end <= max(_GAP_BYTES, gap_samples * length)
        if joins and max(run_end, end) - run_start <= _SPAN_BYTES:
            run_end = max(run_end, end)
        else:
            close(place)
            first, last_file, run_start, run_end = place, file, start, end
    close(len(ids))
    return spans


def _read_bytes(manifest: Manifest, ids: np.ndarray) -> np.ndarray:
    """How much of samples is read, int64: nothing of those that are too large."""
    length = manifest.length[ids].astype(np.int64)
    return np.where(length > manifest.max_sample_bytes, 0, length)


def samples_of(
    manifest: Manifest, run: np.ndarray, start: int, got: storage.Data | Exception
) -> dict[int, memoryview | DataError]:
    """Each sample of a request of `plan_spans`, unchecked and not copied; an error is that of each.

    Args:
        manifest: The split.
        run: [M] ids whose bytes are in `got`.
        start: Where in its file `got` begins.
        got: What was read, or why it was not.

    Raises:
        LightshipError: An error that is no sample's fault.
    """
    if isinstance(got, Exception):
        return {i: _sample_error(manifest, i, got) for i in run.tolist()}
    firsts = manifest.offset[run].astype(np.int64) - start
    lasts = firsts + _read_bytes(manifest, run)
    whole = memoryview(got)
    return {
        i: whole[first:last]
        for i, first, last in zip(run.tolist(), firsts.tolist(), lasts.tolist(), strict=True)
    }


class _Ranges:
    """Samples that are ranges of stored bytes."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest

    def read(self, ids: np.ndarray) -> list[Sample]:
        """`ids` sorted by file and offset."""
        found: dict[int, memoryview | DataError] = {}
        again: list[tuple[storage.Span, np.ndarray]] = []
        for span, run, got in self._fetch(plan_spans(self.manifest, ids)):
            if isinstance(got, Exception) and len(run) > 1:
                again += [pair for i in run for pair in plan_spans(self.manifest, np.array([i]))]
            else:
                found |= samples_of(self.manifest, run, span.start, got)
        for span, run, got in self._fetch(again):  # which of a run's samples it was
            found |= samples_of(self.manifest, run, span.start, got)
        samples = (found[i] for i in ids.tolist())
        return [x if isinstance(x, DataError) else bytes(x) for x in samples]

    def _fetch(
        self, runs: list[tuple[storage.Span, np.ndarray]]
    ) -> list[tuple[storage.Span, np.ndarray, bytes | Exception]]:
        got = storage.read_spans([span for span, _ in runs], on_error="return")
        return [(*pair, data) for pair, data in zip(runs, got, strict=True)]

    def close(self) -> None:
        pass


class _OneFileAtATime:
    """Samples in files that are opened as a whole: gzipped ones and Parquet."""

    def __init__(self, manifest: Manifest):
        self.manifest, self.file_number = manifest, -1
        self.file: Unpacked | RowReader | LightshipError | None = None

    def read(self, ids: np.ndarray) -> list[Sample]:
        """`ids` sorted by file and offset."""
        return [self._read_one(int(i)) for i in ids]

    def _read_one(self, i: int) -> Sample:
        manifest, number = self.manifest, int(self.manifest.file_index[i])
        if number != self.file_number:
            self.close()
            self.file_number, self.file = number, self._open(manifest.url(number))
        if isinstance(self.file, LightshipError):
            return _sample_error(manifest, i, self.file)
        assert self.file is not None
        if error := too_large(manifest, i):
            return error
        try:
            return self.file.read(int(manifest.offset[i]), int(manifest.length[i]))
        except LightshipError as cause:
            return _sample_error(manifest, i, cause)

    def _open(self, url: str) -> "Unpacked | RowReader | LightshipError":
        try:
            return Unpacked(url) if self.manifest.container == "gzip" else RowReader(url)
        except LightshipError as error:
            return error  # is that of every sample in the file

    def close(self) -> None:
        if isinstance(self.file, (Unpacked, RowReader)):
            self.file.close()
