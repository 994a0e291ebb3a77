"""Many samples at once: blocks of bytes from storage, and whole splits decoded by threads."""

import gzip
import os
import shutil
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, Literal

import numpy as np

from lightship import storage
from lightship.data.manifest import Manifest
from lightship.data.pixels import decode, fit_square
from lightship.data.sources_parquet import RowReader
from lightship.exits import DataError, LightshipError

__all__ = ["decode", "decode_all", "fit_square", "read_samples"]

_GROUP_BYTES, _GROUP_SAMPLES = 32 * 2**20, 4096
_SPAN_BYTES = 4 * 2**20
_GAP_BYTES = 16 * 2**10  # reading over a tar header costs less than another request
_CHUNK_BYTES, _CHUNK_SAMPLES = 2**20, 256
_IN_MEMORY_BYTES = 2**28  # a larger unpacked file goes to a temporary file

Sample = bytes | DataError


def read_samples(
    manifest: Manifest, ids: Sequence[int] | np.ndarray
) -> Iterator[tuple[int, Sample]]:
    """The bytes of samples, in the order of `ids`; many are fetched at once.

    Groups of at most 32 MiB are fetched when their first sample is asked for. In a group, samples
    that lie close together in a file are one request (of up to 4 MiB); a gzipped file is unpacked
    and a Parquet row group decoded once and kept until another one is needed. Any rank; blocks.

    Args:
        manifest: The split.
        ids: [M] integers below len(manifest).

    Yields:
        (id, bytes), or (id, DataError) for a sample that is empty, truncated, gone or whose
        checksum differs.

    Raises:
        LightshipError: The storage fails (no access, deadline), which is no sample's fault.
    """
    ids = np.asarray(ids, dtype=np.int64)
    reader = _Ranges(manifest) if manifest.container == "bytes" else _OneFileAtATime(manifest)
    with closing(reader):
        for group in _groups(manifest.length[ids]):
            chosen = ids[group]
            in_place = np.lexsort((manifest.offset[chosen], manifest.file_index[chosen]))
            data: list[Sample] = [b""] * len(chosen)
            for where, got in zip(in_place, reader.read(chosen[in_place]), strict=True):
                data[where] = _check(manifest, int(chosen[where]), got)
            yield from zip(chosen.tolist(), data, strict=True)


def decode_all(
    manifest: Manifest,
    ids: Sequence[int] | np.ndarray | None = None,
    image_size_px: int | None = None,
    threads: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    max_bad_fraction: float = 0.01,
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Read and decode samples into one array, files in the order they lie. Any rank; blocks.

    Beyond the result, memory holds a group being read and a few MiB being decoded.

    Args:
        manifest: The split.
        ids: [N] which samples; default: all.
        image_size_px: Make squares of this side (`fit_square`); None: all must have one size.
        threads: Decoding threads; 0: one a core.
        on_error: Raise at the first bad sample, or mark it and go on.
        max_bad_fraction: With skip, the largest share of N that may be bad.
        progress: Called now and then, in the calling thread, with how many are done so far.

    Returns:
        ([N, 3, H, W] uint8 in the order of `ids`, [N] bool: could not be read, all zeros).

    Raises:
        DataError: A bad sample (raise), too many or all (skip), or images of two sizes.
    """
    ids = np.arange(len(manifest)) if ids is None else np.asarray(ids, dtype=np.int64)
    order = np.lexsort((manifest.offset[ids], manifest.file_index[ids]))
    result = _Result(manifest, ids, max_bad_fraction if on_error == "skip" else None)
    threads = threads or os.cpu_count() or 1
    pool = ThreadPoolExecutor(threads)
    waiting: deque[tuple[list[int], Future[list[np.ndarray | DataError]]]] = deque()
    done, samples = 0, (sample for _, sample in read_samples(manifest, ids[order]))
    try:
        for places, chunk in _chunks(order.tolist(), samples):
            decoding = pool.submit(_decode_chunk, chunk, manifest.encoding, image_size_px)
            waiting.append((places, decoding))
            is_last = done + sum(len(each) for each, _ in waiting) == len(ids)
            while waiting and (is_last or len(waiting) > 2 * threads + 2):
                places, decoding = waiting.popleft()
                for place, image in zip(places, decoding.result(), strict=True):
                    result.put(place, image)
                done += len(places)
                if progress is not None:
                    progress(done)
    finally:
        pool.shutdown(cancel_futures=True)
    return result.images, result.bad


class _Result:
    """The array that fills up, and which samples are bad."""

    def __init__(
        self,
        manifest: Manifest,
        ids: np.ndarray,
        max_bad_fraction: float | None,
    ):
        self.manifest, self.ids, self.max_bad_fraction = manifest, ids, max_bad_fraction
        self.bad = np.zeros(len(ids), dtype=bool)
        self.images = np.zeros((0, 3, 0, 0), dtype=np.uint8)
        self.first_place: int | None = None

    def put(self, place: int, image: np.ndarray | DataError) -> None:
        if isinstance(image, DataError):
            return self.put_bad(place, image)
        if self.first_place is None:
            self.first_place = place
            self.images = np.zeros((len(self.ids), *image.shape), dtype=np.uint8)
        if image.shape != self.images.shape[1:]:
            sizes = [f"{w}x{h} px" for h, w in (image.shape[1:], self.images.shape[2:])]
            names = [self.manifest.name(self.ids[each]) for each in (place, self.first_place)]
            raise DataError(
                f"{names[0]} is {sizes[0]} and {names[1]} {sizes[1]}: images of more than one "
                "size need --data.image_size_px"
            )
        self.images[place] = image
        return None

    def put_bad(self, place: int, error: DataError) -> None:
        name = self.manifest.name(self.ids[place])
        told = str(error) if name in str(error) else f"{name}: {error}"
        if self.max_bad_fraction is None:
            raise DataError(f"{told}; --data.on_error skip leaves such images out") from error
        self.bad[place] = True
        count, size = int(self.bad.sum()), len(self.bad)
        if count == size:
            raise DataError(f"none of {size} images can be read; the last: {told}") from error
        if count > self.max_bad_fraction * size:
            raise DataError(
                f"at least {count} of {size} images are bad, more than --data.max_bad_fraction "
                f"{self.max_bad_fraction:g} allows; the last: {told}"
            ) from error


def _chunks(
    places: Sequence[int], samples: Iterator[Sample]
) -> Iterator[tuple[list[int], list[Sample]]]:
    chunk: list[Sample] = []
    start, size = 0, 0
    for end, sample in enumerate(samples, 1):
        chunk.append(sample)
        size += len(sample) if isinstance(sample, bytes) else 0
        if size >= _CHUNK_BYTES or len(chunk) == _CHUNK_SAMPLES or end == len(places):
            yield list(places[start:end]), chunk
            chunk, start, size = [], end, 0


def _decode_chunk(
    chunk: list[Sample], encoding: str, image_size_px: int | None
) -> list[np.ndarray | DataError]:
    images: list[np.ndarray | DataError] = []
    for data in chunk:
        try:
            if isinstance(data, DataError):
                raise data
            image = decode(data, encoding)
            images.append(image if image_size_px is None else fit_square(image, image_size_px))
        except DataError as error:
            images.append(error)
    return images


def _groups(lengths: np.ndarray) -> Iterator[slice]:
    start, size = 0, 0
    for end, length in enumerate(lengths.tolist()):
        if end > start and (size + length > _GROUP_BYTES or end - start == _GROUP_SAMPLES):
            yield slice(start, end)
            start, size = end, 0
        size += length
    if start < len(lengths):
        yield slice(start, len(lengths))


def _check(manifest: Manifest, i: int, data: Sample) -> Sample:
    if isinstance(data, DataError):
        return data
    if not data:
        return DataError(f"{manifest.name(i)} is empty (0 bytes)")
    known = int(manifest.crc32[i])
    if known >= 0 and zlib.crc32(data) != known:
        return DataError(f"{manifest.name(i)}: checksum {zlib.crc32(data):08x}, not {known:08x}")
    return data


def _sample_error(manifest: Manifest, i: int, error: Exception) -> DataError:
    """The error as one sample's; one that is no sample's fault is raised on."""
    if isinstance(error, LightshipError) and error.exit_name == "data":
        return DataError(f"{manifest.name(i)}: {error}")
    raise error


class _Ranges:
    """Samples that are ranges of stored bytes."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest

    def read(self, ids: np.ndarray) -> list[Sample]:
        """`ids` sorted by file and offset."""
        columns = (getattr(self.manifest, name)[ids] for name in ("file_index", "offset", "length"))
        places = list(zip(*(column.tolist() for column in columns), strict=True))
        runs: list[list[int]] = []  # positions in ids that are read by one request
        last_file, run_start, run_end = -1, 0, 0
        for position, (file, start, length) in enumerate(places):
            joins = file == last_file and start - run_end <= _GAP_BYTES
            if joins and max(run_end, start + length) - run_start <= _SPAN_BYTES:
                runs[-1].append(position)
                run_end = max(run_end, start + length)
            else:
                runs.append([position])
                last_file, run_start, run_end = file, start, start + length
        data: list[Sample] = [b""] * len(ids)
        again = []
        for run, got in self._fetch(
            places, [run for run in runs if any(places[p][2] for p in run)]
        ):
            if isinstance(got, Exception) and len(run) > 1:
                again += [[position] for position in run if places[position][2]]
            elif isinstance(got, Exception):
                data[run[0]] = _sample_error(self.manifest, int(ids[run[0]]), got)
            else:
                first = places[run[0]][1]
                for position in run:
                    _, start, length = places[position]
                    whole = len(run) == 1
                    data[position] = got if whole else got[start - first : start - first + length]
        for (position,), got in self._fetch(places, again):  # which of a run's samples it was
            bad = isinstance(got, Exception)
            data[position] = _sample_error(self.manifest, int(ids[position]), got) if bad else got
        return data

    def _fetch(
        self, places: list[tuple[int, int, int]], runs: list[list[int]]
    ) -> list[tuple[list[int], Any]]:
        spans = [
            storage.Span(
                self.manifest.url(places[run[0]][0]),
                places[run[0]][1],
                max(places[p][1] + places[p][2] for p in run),
            )
            for run in runs
        ]
        return list(zip(runs, storage.read_spans(spans, on_error="return"), strict=True))

    def close(self) -> None:
        pass


class _OneFileAtATime:
    """Samples in files that are opened as a whole: gzipped ones and Parquet."""

    def __init__(self, manifest: Manifest):
        self.manifest, self.file_number = manifest, -1
        self.file: _Unpacked | RowReader | LightshipError | None = None

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
        try:
            return self.file.read(int(manifest.offset[i]), int(manifest.length[i]))
        except LightshipError as error:
            return _sample_error(manifest, i, error)

    def _open(self, url: str) -> "_Unpacked | RowReader | LightshipError":
        try:
            return _Unpacked(url) if self.manifest.container == "gzip" else RowReader(url)
        except LightshipError as error:
            return error  # is that of every sample in the file

    def close(self) -> None:
        if isinstance(self.file, (_Unpacked, RowReader)):
            self.file.close()


class _Unpacked:
    """A gzipped file, unpacked: in memory, or if large in a temporary file."""

    def __init__(self, url: str):
        self.plain = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES)  # noqa: SIM115 (kept open)
        try:
            with storage.open_binary(url) as packed, gzip.GzipFile(fileobj=packed) as stream:
                shutil.copyfileobj(stream, self.plain, 2**20)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"a damaged gzip file ({error})") from error

    def read(self, offset: int, length: int) -> bytes:
        self.plain.seek(offset)
        data = self.plain.read(length)
        if len(data) < length:
            raise DataError(f"truncated after {len(data)} bytes")
        return data

    def close(self) -> None:
        self.plain.close()
