"""Samples as pixels: one decoder for all ways of reading, and whole splits decoded by threads."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lightship.data.bad_samples import BadSamples
from lightship.data.images.decode import decode
from lightship.data.images.limits import DEFAULT_LIMITS, ImageLimits
from lightship.data.images.resize import DEFAULT_RESIZE, Resize, decode_box, decode_square
from lightship.data.manifest import Manifest
from lightship.data.sample_reader import Raw, Sample, read_samples
from lightship.errors import DataError

_CHUNK_BYTES, _CHUNK_SAMPLES = 2**20, 256


@dataclass(frozen=True)
class SampleDecoder:
    """Turns the bytes of a split's samples into pixels. For any thread.

    Attributes:
        manifest: The split.
        size_px: Side of the squares; None: each image keeps its size.
        resize: How images are scaled and cropped to that; None: they must have it.
        limits: What decoding an image may cost.
        min_area: Least share of the image in a random box; 0: the whole image.
    """

    manifest: Manifest
    size_px: int | None = None
    resize: Resize | None = DEFAULT_RESIZE
    limits: ImageLimits = DEFAULT_LIMITS
    min_area: float = 0.0

    def decode(
        self, i: int, data: Raw, box_draws: np.ndarray | None = None
    ) -> np.ndarray | DataError:
        """The pixels of sample `i`, [H, W, 3] uint8, or why it has none.

        Args:
            i: Its id.
            data: Its bytes, or why there are none.
            box_draws: [10, 4] in [0, 1), if there is a `min_area`.

        Raises:
            DataError: The image is not `size_px` and not resized: the setting is at fault.
        """
        if isinstance(data, DataError):
            return data
        encoding, size_px = self.manifest.encoding, self.size_px
        try:
            if size_px and self.min_area and box_draws is not None:
                interpolation = (self.resize or DEFAULT_RESIZE).interpolation
                how = self.min_area, self.limits, interpolation
                return decode_box(data, encoding, size_px, box_draws, *how)
            if size_px and self.resize:
                return decode_square(data, encoding, size_px, self.limits, self.resize)
            image = decode(data, encoding, limits=self.limits)
        except DataError as error:
            return error
        if size_px and image.shape != (size_px, size_px, 3):
            name = self.manifest.name(i)
            raise _two_sizes(name, image.shape, "others", (size_px, size_px, 3))
        return image


def decode_all(
    manifest: Manifest,
    ids: Sequence[int] | np.ndarray | None = None,
    image_size_px: int | None = None,
    resize: Resize | None = DEFAULT_RESIZE,
    threads: int = 1,
    max_bad_fraction: float | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> tuple[np.ndarray, BadSamples]:
    """Read and decode samples into one array, files in the order they lie. Any rank; blocks.

    Beyond the result, memory holds a group being read and a few MiB being decoded.

    Args:
        manifest: The split.
        ids: [N] which samples; default: all.
        image_size_px: Make squares of this side (`fit_square`); None: all must have one size.
        resize: How; None: images must have that side instead.
        threads: Decoding threads.
        max_bad_fraction: Largest share of the split that may be bad and is left black; None: raise
            at the first.
        limits: What decoding an image may cost.

    Returns:
        ([N, H, W, 3] uint8 in the order of `ids`; those that could not be read).

    Raises:
        DataError: A bad sample, too many or all of the split, or images of two sizes.
    """
    ids = np.arange(len(manifest)) if ids is None else np.asarray(ids, dtype=np.int64)
    order = np.lexsort((manifest.offset[ids], manifest.file_index[ids]))
    result = _Result(manifest, ids, max_bad_fraction, image_size_px or 0)
    decoder = SampleDecoder(manifest, image_size_px, resize, limits)
    pool = ThreadPoolExecutor(threads)
    waiting: deque[tuple[list[int], Future[list[np.ndarray | DataError]]]] = deque()
    done, samples = 0, (sample for _, sample in read_samples(manifest, ids[order]))
    try:
        for places, chunk in _chunks(order.tolist(), samples):
            decoding = pool.submit(_decode_chunk, decoder, ids[places], chunk)
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
        size_px: int,
    ):
        self.manifest, self.ids = manifest, ids
        self.bad = BadSamples(manifest, len(manifest), max_bad_fraction)
        self.images = np.zeros((len(ids), size_px, size_px, 3), dtype=np.uint8)
        self.first = ""

    def put(self, place: int, image: np.ndarray | DataError) -> None:
        if isinstance(image, DataError):
            self.bad.add(int(self.ids[place]), image)
            return
        if not self.images.shape[1]:
            self.images = np.zeros((len(self.ids), *image.shape), dtype=np.uint8)
            self.first = self.manifest.name(self.ids[place])
        if image.shape != self.images.shape[1:]:
            name = self.manifest.name(self.ids[place])
            raise _two_sizes(name, image.shape, self.first, self.images.shape[1:])
        self.images[place] = image


def _two_sizes(
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
    decoder: SampleDecoder, ids: np.ndarray, chunk: list[Sample]
) -> list[np.ndarray | DataError]:
    return [decoder.decode(int(i), data) for i, data in zip(ids, chunk, strict=True)]
