"""Whether the data at --data.root can be read: fast enough, and every image."""

import time
from collections.abc import Mapping

import numpy as np

from lightship import storage
from lightship.config import DataConfig
from lightship.data import bad_samples
from lightship.data.images.limits import ImageLimits
from lightship.data.manifest import Manifest, refuse_one_class
from lightship.data.regime import is_streamed
from lightship.data.sample_decoder import SampleDecoder
from lightship.data.sample_reader import read_samples
from lightship.data.sources.layouts import scan
from lightship.distributed import comm
from lightship.doctor.checks import Finding, Status, skipped
from lightship.doctor.context import Context
from lightship.doctor.dry_run import step_cost
from lightship.doctor.samples import TAR_SHARDS, first_samples
from lightship.errors import DataError, LightshipError, TimeoutExpired
from lightship.storage.parallel import in_daemon

_MEASURED_S, _SPANS_AT_ONCE = 2.0, 16
_FAR_TOO_SLOW = 10
_STEP_COST_KNOWN_S = 16.0  # a slow net is no slow data
_SCAN_STARTS_S, _SCAN_ENDS_S = 9.0, 18.0
_EXAMINED_S, _EXAMINED_AT_ONCE = 3.0, 32
_MAX_REMOTE, _MAX_LOCAL = 64, 2048
_NAMED_CLASSES = 4
_FIX_REMOTE = (
    "correct --data.root, and give the pod's identity, or AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY "
    "and AWS_ENDPOINT_URL, permission to list and read there"
)
_FIX_LOCAL = (
    "correct --data.root (a relative path starts at the working directory), in a container mount "
    "the folder, or fix the file that is named"
)
_FIX_READ = (
    "lightship pack the images into shards, keep them in the region of the nodes, and set "
    "--data.cache_gib so that later epochs read the local disk"
)
_FIX_DECODE = "give the node more cores, or lightship pack --short_side_px to store images smaller"
_EXITS = "fit exits with code 65"


def speeds(context: Context) -> tuple[float, float | None]:
    """Bytes/s read, and images/s decoded by one thread (None: unknown). Blocks.

    Raises:
        LightshipError: They cannot be read, or decoded (unless data.on_error is skip).
    """
    data, first = context.config.data, context.once(first_samples)
    storage.read_spans(first.spans[:1])  # connects
    read_bytes, started_s = 0, time.perf_counter()
    for at in range(0, len(first.spans), _SPANS_AT_ONCE):
        parts = storage.read_spans(first.spans[at : at + _SPANS_AT_ONCE])
        read_bytes += sum(len(part) for part in parts if isinstance(part, bytes))
        if time.perf_counter() - started_s > _MEASURED_S:
            break
    bytes_per_s = read_bytes / max(1e-6, time.perf_counter() - started_s)
    if not first.images:
        return bytes_per_s, None
    size_px, started_s = first.size_px(data) or 1, time.perf_counter()
    count = sum(1 for _ in first.decoded(data, size_px))
    return bytes_per_s, count / max(1e-6, time.perf_counter() - started_s)


def speed(context: Context) -> Finding:
    """Images/s that storage and cores can feed, against what the devices train. Blocks."""
    data = context.config.data
    is_remote = storage.is_remote(data.root)
    try:
        first, (bytes_per_s, decoded_per_s) = context.once(first_samples), context.once(speeds)
    except TimeoutExpired:
        raise
    except LightshipError as error:
        fix = _FIX_REMOTE if is_remote else _FIX_LOCAL
        return Finding("fail", str(error), "fit exits before its first step", fix)
    found = f"{first.layout}, {bytes_per_s / 2**20:,.0f} MiB/s"
    if first.whole_bytes is not None:
        seconds = first.whole_bytes / max(1.0, bytes_per_s)
        means = "read whole before training" + (f", in about {seconds:.0f} s" if is_remote else "")
        return Finding("ok", f"{found}; {first.whole_bytes / 2**20:,.0f} MiB", means)
    if first.image_bytes is None:
        return Finding("ok", f"{found}; no image in its first MiB", "its speed is unknown")
    read_per_s = bytes_per_s / max(1.0, first.image_bytes)
    found += f" = {read_per_s:,.0f} images/s"
    decode_per_s = read_per_s
    if decoded_per_s:
        threads = data.decode_threads * context.processes_or_one or comm.node_cores()
        decode_per_s = decoded_per_s * threads
        found += f", {threads} threads decode {decode_per_s:,.0f}"
    needed_per_s = _trained_per_s(context)
    if needed_per_s is None:
        return Finding("ok", found, "the devices' training speed is unknown")
    found += f"; training needs {needed_per_s:,.0f}"
    fed_per_s = min(read_per_s, decode_per_s)
    if fed_per_s >= needed_per_s:
        return Finding("ok", found, "training does not wait for images")
    if not is_streamed(data):
        means = "held in memory, the set is read once, before training; streamed, it would be slow"
        return Finding("ok", found, means)
    means = f"training waits for images {1 - fed_per_s / needed_per_s:.0%} of the time"
    status: Status = "fail" if fed_per_s * _FAR_TOO_SLOW < needed_per_s else "warn"
    return Finding(status, found, means, _FIX_READ if read_per_s <= decode_per_s else _FIX_DECODE)


def _trained_per_s(context: Context) -> float | None:
    """Images/s that this node's devices train; None: unknown, or not in time."""
    if context.config.trainer.is_on_tpu:
        return None
    measured = context.start(step_cost)
    if not context.is_known(measured, _STEP_COST_KNOWN_S) or measured.exception() is not None:
        return None  # the check `model memory` reports it
    cost = measured.result()
    if cost is None or cost.images_per_s is None:
        return None
    # On a CPU the processes share the cores that one had alone.
    return cost.images_per_s * (context.processes_or_one if context.on_gpus else 1)


def data_set(context: Context) -> Finding:
    """List the data set as a fit does, and decode images spread over it. Blocks.

    Raises:
        LightshipError: What ends a fit.
    """
    try:
        first = context.once(first_samples)
        context.once(speeds)  # a listing at the same time would slow it down
    except LightshipError:
        return skipped("see data")
    if first.whole_bytes is not None or first.layout == TAR_SHARDS:
        return skipped(f"{first.layout}: known once a fit has read it")
    context.is_known(context.start(step_cost), _SCAN_STARTS_S)
    return examine(context.config.data, context.left_s(_SCAN_ENDS_S))


def examine(data: DataConfig, limit_s: float) -> Finding:
    """The same, within `limit_s`.

    Raises:
        LightshipError: What ends a fit.
    """
    listing = in_daemon(lambda: scan(data.root, data.root_md5))
    left_s = max(0.0, limit_s - _EXAMINED_S)
    try:
        splits = listing.result(left_s)
    except TimeoutError:
        if listing.done():
            raise
        return skipped(f"not listed within {left_s:.0f} s; a fit lists it once and keeps the list")
    found = _summary(splits)
    if "train" not in splits:
        fix = "put the training images into a folder train/ under --data.root"
        return Finding("fail", f"{found}, and no train split", _EXITS, fix)
    refuse_one_class(splits["train"], data.root)
    examined, bad = _unreadable(data, splits["train"])
    if not bad:
        found += f"; {examined:,} of train examined"
        if not splits["train"].not_read:
            return Finding("ok", found, "fit can train on it")
        fix = "convert them to JPEG, PNG, WebP, BMP or TIFF, or remove them"
        return Finding("warn", found, "no reader for the other files", fix)
    found += f"; {len(bad)} of {examined:,} examined cannot be read, such as {bad[0]}"
    fix = "fix or remove such files"
    if data.on_error == "raise":
        fix += ", or set --data.on_error skip"
        return Finding("fail", found, f"{_EXITS} at the first of them", fix)
    if len(bad) > data.max_bad_fraction * examined:
        bound = f"--data.max_bad_fraction ({data.max_bad_fraction:g})"
        return Finding("fail", found, f"more than {bound}: {_EXITS}", f"{fix}, or raise {bound}")
    return Finding("warn", found, "fit skips and reports them", fix)


def _summary(splits: Mapping[str, Manifest]) -> str:
    sizes = ", ".join(f"{len(manifest):,} {split}" for split, manifest in splits.items())
    first = next(iter(splits.values()))
    names = ", ".join(first.class_names[:_NAMED_CLASSES])
    more = ", ..." if len(first.class_names) > _NAMED_CLASSES else ""
    not_read = f"; not read: {first.not_read}" if first.not_read else ""
    return f"{sizes} images in {len(first.class_names)} classes ({names}{more}){not_read}"


def _unreadable(data: DataConfig, manifest: Manifest) -> tuple[int, list[str]]:
    """How many images were examined, and which of them cannot be read, with the reason."""
    count = _MAX_REMOTE if storage.is_remote(data.root) else _MAX_LOCAL
    ids = np.unique(np.linspace(0, len(manifest) - 1, count).astype(np.int64))
    np.random.default_rng(0).shuffle(ids)  # those examined in time are spread over the whole split
    decoder = SampleDecoder(manifest, limits=ImageLimits.of(data))
    ends_s, examined, bad = time.monotonic() + _EXAMINED_S, 0, []
    for at in range(0, len(ids), _EXAMINED_AT_ONCE):
        for i, sample in read_samples(manifest, np.sort(ids[at : at + _EXAMINED_AT_ONCE])):
            examined += 1
            if isinstance(error := decoder.decode(i, sample), DataError):
                bad.append(bad_samples.reason(manifest, i, error))
        if time.monotonic() > ends_s:
            break
    return examined, bad
