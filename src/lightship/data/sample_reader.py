"""Many samples at once: blocks of bytes from storage, and whole splits decoded by threads."""

import gzip
import shutil
import tempfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import numpy as np

from lightship import storage
from lightship.data.bad_samples import BadSamples
from lightship.data.images.decode import DEFAULT_LIMIT, PixelLimit, decode
from lightship.data.images.resize import decode_square, fit_square
from lightship.data.manifest import Manifest
from lightship.data.sources.parquet_file import RowReader
from lightship.distributed import comm
from lightship.errors import DataError, LightshipError

__all__ = ["decode", "decode_all", "fit_square", "read_samples"]

_GROUP_BYTES, _GROUP_SAMPLES = 32 * 2**20, 4096
_SPAN_BYTES = 8 * 2**20  # a block (4 MiB) whole, with gaps
_GAP_BYTES = 16 * 2**10  # reading over a tar header costs less than another request
_CHUNK_BYTES, _CHUNK_SAMPLES = 2**20, 256
_IN_MEMORY_BYTES = 2**28  # a larger unpacked file goes to a temporary file

Sample = bytes | DataError


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
                if not isinstance(got, DataError):
                    got = fault_of(manifest, int(chosen[where]), got) or got
                data[where] = got
            yield from zip(chosen.tolist(), data, strict=True)


def decode_all(
    manifest: Manifest,
    ids: Sequence[int] | np.ndarray | None = None,
    image_size_px: int | None = None,
    resize: bool = True,
    threads: int = 0,
    max_bad_fraction: float | None = None,
    limit: PixelLimit = DEFAULT_LIMIT,
) -> tuple[np.ndarray, BadSamples]:
    """Read and decode samples into one array, files in the order they lie. Any rank; blocks.

    Beyond the result, memory holds a group being read and a few MiB being decoded.

    Args:
        manifest: The split.
        ids: [N] which samples; default: all.
        image_size_px: Make squares of this side (`fit_square`); None: all must have one size.
        resize: If not, images must have that side instead.
        threads: Decoding threads; 0: one a core.
        max_bad_fraction: Largest share of N that may be bad and is left black; None: raise at the
            first.
        limit: Bound of an image that is decoded.

    Returns:
        ([N, H, W, 3] uint8 in the order of `ids`; those that could not be read).

    Raises:
        DataError: A bad sample, too many or all, or images of two sizes.
    """
    ids = np.arange(len(manifest)) if ids is None else np.asarray(ids, dtype=np.int64)
    order = np.lexsort((manifest.offset[ids], manifest.file_index[ids]))
    result = _Result(manifest, ids, max_bad_fraction)
    if not resize and image_size_px is not None:
        result.expect((image_size_px, image_size_px, 3))
        image_size_px = None
    threads = threads or comm.cores()
    pool = ThreadPoolExecutor(threads)
    waiting: deque[tuple[list[int], Future[list[np.ndarray | DataError]]]] = deque()
    done, samples = 0, (sample for _, sample in read_samples(manifest, ids[order]))
    try:
        for places, chunk in _chunks(order.tolist(), samples):
            decoding = pool.submit(_decode_chunk, chunk, manifest.encoding, image_size_px, limit)
            waiting.append((places, decoding))
            is_last = done + sum(len(each) for each, _ in waiting) == len(ids)
            while waiting and (is_last or len(waiting) > 2 * threads + 2):
                places, decoding = waiting.popleft()
                for place, image in zip(places, decoding.result(), strict=True):
                    result.put(place, image)
                done += len(places)
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
        self.manifest, self.ids = manifest, ids
        self.bad = BadSamples(manifest, len(ids), max_bad_fraction)
        self.images = np.zeros((0, 0, 0, 3), dtype=np.uint8)
        self.first = "others"

    def expect(self, shape: tuple[int, ...]) -> None:
        """All images have this shape [H, W, 3]."""
        self.images = np.zeros((len(self.ids), *shape), dtype=np.uint8)

    def put(self, place: int, image: np.ndarray | DataError) -> None:
        if isinstance(image, DataError):
            self.bad.add(int(self.ids[place]), image)
            return
        if not self.images.shape[1]:
            self.expect(image.shape)
            self.first = self.manifest.name(self.ids[place])
        if image.shape != self.images.shape[1:]:
            name = self.manifest.name(self.ids[place])
            raise two_sizes(name, image.shape, self.first, self.images.shape[1:])
        self.images[place] = image


def two_sizes(
    name: str, shape: tuple[int, ...], other: str, other_shape: tuple[int, ...]
) -> DataError:
    """What to raise where two images ([H, W, 3]) differ in size and no size was asked for."""
    sizes = [f"{width}x{height} px" for height, width, _ in (shape, other_shape)]
    return DataError(
        f"{name} is {sizes[0]} and {other} {sizes[1]}: images of more than one size need "
        "--data.image_size_px"
    )


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
    chunk: list[Sample], encoding: str, image_size_px: int | None, limit: PixelLimit
) -> list[np.ndarray | DataError]:
    images: list[np.ndarray | DataError] = []
    for data in chunk:
        try:
            if isinstance(data, DataError):
                raise data
            if image_size_px is None:
                images.append(decode(data, encoding, limit=limit))
            else:
                images.append(decode_square(data, encoding, image_size_px, limit))
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


def fault_of(manifest: Manifest, i: int, data: bytes | memoryview) -> DataError | None:
    """Why `data` is not the whole sample `i`, if it is not: empty, or of another checksum."""
    if not data:
        return DataError(f"{manifest.name(i)} is empty (0 bytes)")
    known = int(manifest.crc32[i])
    if known >= 0 and zlib.crc32(data) != known:
        return DataError(f"{manifest.name(i)}: checksum {zlib.crc32(data):08x}, not {known:08x}")
    return None


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
        as a tar's headers, are always read over.
    """
    columns = (getattr(manifest, name)[ids] for name in ("file_index", "offset", "length"))
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
    firsts = manifest.offset[run] - start
    lasts = firsts + manifest.length[run]
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
