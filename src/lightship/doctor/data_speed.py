"""How many images a second the data URL and this node's cores can feed, against what is needed."""

import time
from collections.abc import Callable
from typing import NamedTuple

from lightship import storage
from lightship.config import DataConfig
from lightship.data.images.decode import PixelLimit
from lightship.data.images.resize import decode_square
from lightship.doctor.check import Finding
from lightship.doctor.first_samples import FirstSamples
from lightship.errors import DataError

_MEASURE_S = 2.0
_AT_ONCE = 16
_FAR_TOO_SLOW = 10


class Speeds(NamedTuple):
    """Bytes/s read, and images/s decoded by one thread (None: not known)."""

    read_bytes: float
    decoded_images: float | None


def measure(data: DataConfig, first: FirstSamples) -> Speeds:
    """Read and decode the first samples. Blocks.

    Raises:
        LightshipError: They cannot be read, or decoded (unless data.on_error is skip).
    """
    storage.read_spans(first.spans[:1])  # connects
    read_bytes, begun_s = 0, time.perf_counter()
    for at in range(0, len(first.spans), _AT_ONCE):
        for got in storage.read_spans(first.spans[at : at + _AT_ONCE]):
            read_bytes += len(got) if isinstance(got, bytes) else 0
        if time.perf_counter() - begun_s > _MEASURE_S:
            break
    bytes_per_s = read_bytes / max(1e-6, time.perf_counter() - begun_s)
    if not first.images:
        return Speeds(bytes_per_s, None)
    size = first.size_px(data) or 1
    begun_s = time.perf_counter()
    for image in first.images:
        try:
            decode_square(image, first.encoding, size, PixelLimit(data.max_image_pixels))
        except DataError:
            if data.on_error == "raise":
                raise
    return Speeds(bytes_per_s, len(first.images) / max(1e-6, time.perf_counter() - begun_s))


def feed(
    data: DataConfig,
    first: FirstSamples,
    speeds: Speeds,
    threads: int,
    needed_per_s: Callable[[], float | None],
) -> Finding:
    """Whether training would wait for its images. Blocks for `needed_per_s`.

    Args:
        data: The data section.
        first: What lies at the root.
        speeds: Measured with it.
        threads: That decode on this node.
        needed_per_s: Gives images a second that this node's devices train; None: not known. It is
            not asked where that does not matter.
    """
    bytes_per_s, decoded_per_s = speeds
    speed = f"{first.told}, {bytes_per_s / 2**20:,.0f} MiB/s"
    if first.whole_bytes is not None:
        seconds = first.whole_bytes / max(1.0, bytes_per_s)
        told = f"{speed}; {first.whole_bytes / 2**20:,.0f} MiB"
        means = f"read whole before training, in about {seconds:.0f} s"
        return Finding(
            "ok", told, means if storage.is_remote(data.root) else "read before training"
        )
    if first.image_bytes is None:
        return Finding("ok", f"{speed}; no image in its first MiB", "its speed cannot be told")
    read_per_s = bytes_per_s / max(1.0, first.image_bytes)
    decode_per_s = decoded_per_s * threads if decoded_per_s else None
    fed_per_s = min(read_per_s, decode_per_s or read_per_s)
    told = f"{speed} = {read_per_s:,.0f} images/s"
    if decode_per_s:
        told += f", {threads} threads decode {decode_per_s:,.0f}"
    is_streamed = data.mode == "streaming" or bool(data.crop_min_area)
    needed = needed_per_s()
    if needed is None:
        return Finding("ok", told, "how fast the devices train is not known")
    told += f"; training takes {needed:,.0f}"
    if fed_per_s >= needed:
        return Finding("ok", told, "training does not wait for images")
    if not is_streamed:
        means = (
            "a set held in memory is read once, before training; a streamed one would be waited for"
        )
        return Finding("ok", told, means)
    waits = f"training waits for images {1 - fed_per_s / needed:.0%} of the time"
    slow_storage = read_per_s <= (decode_per_s or read_per_s)
    fix = (
        "lightship pack the images into shards, keep them in the region of the nodes, and set "
        "--data.cache_gib so that later epochs read the local disk"
        if slow_storage
        else "give the node more cores, or lightship pack --short_side_px to store images smaller"
    )
    is_hopeless = fed_per_s * _FAR_TOO_SLOW < needed
    return Finding("fail" if is_hopeless else "warn", told, waits, fix)
