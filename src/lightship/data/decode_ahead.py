"""Decodes a local set that memory holds while the command imports torch, which takes seconds.

A process of its own, without torch, lists the images, decodes them and puts them into the cache of
decoded splits, where `ImageSplit` finds them. If it fails (a damaged image, a full disk), it ends
without a message: the command decodes the split itself, and reports the error.
"""

import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from lightship import host, storage
from lightship.config import NAMED_SETS, DataConfig
from lightship.data.bad_samples import BadSamples
from lightship.data.decoded_cache import DecodedCache, key_of_split
from lightship.data.held_out import split_validation
from lightship.data.images.limits import ImageLimits
from lightship.data.manifest import LABELLED_SPLITS, Manifest
from lightship.data.regime import choose_regime, is_streamed, resize_of, side_of_first
from lightship.data.sample_decoder import decode_all
from lightship.data.sources import layouts
from lightship.data.streaming.worker_process import spawn

logger = logging.getLogger(__name__)
_MAX_BYTES = 512 * 2**20
"""Of a decoded split: until it is written, this process holds it beside the disk's cache."""
_LOOK_EVERY_S = 0.02
_process: "subprocess.Popen[bytes] | None" = None


def begin(config: DataConfig) -> None:
    """Start decoding if the settings allow it. Does not block.

    Called by the only rank of a command: other processes would not wait for it.
    """
    if is_streamed(config) or not config.decoded_cache_gib or host.usable_cores() < 2:
        return
    if config.root in NAMED_SETS or storage.is_remote(config.root):
        return
    if not os.path.isdir(storage.local_path(config.root)):  # False also for an invalid name
        return
    try:
        _start(config)
    except OSError as error:  # no more processes or memory
        logger.debug(f"images are not decoded ahead: {error}")


def _start(config: DataConfig) -> None:
    global _process
    _process = spawn(
        "from lightship.data.decode_ahead import main; main()",
        config.root,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert _process.stdin is not None
    # The pipe stays open: its end tells that process that this one has ended.
    _process.stdin.write(json.dumps(dataclasses.asdict(config)).encode() + b"\n")
    _process.stdin.flush()


def wait_for(path: Path) -> None:
    """Wait until a file is there that the process, if one was begun, may yet write. Blocks."""
    ends_s = time.monotonic() + storage.Limits.now().total_s
    while _process is not None and _process.poll() is None and not path.exists():
        if time.monotonic() > ends_s:
            return
        time.sleep(_LOOK_EVERY_S)
    if _process is not None:
        with contextlib.suppress(OSError):  # not there: it failed
            ago_s = time.time() - path.stat().st_mtime
            logger.debug(f"images were decoded {ago_s:.3f} s ago")


def main() -> None:
    """Decode all splits of the settings on standard input, those for training first."""
    config = DataConfig(**json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_owner, daemon=True).start()
    splits = layouts.scan(config.root, config.root_md5)
    if "val" not in splits and "train" in splits and config.val_fraction > 0:
        splits["train"], splits["val"] = split_validation(splits["train"], config.val_fraction)
    size_px = config.image_size_px
    for name in LABELLED_SPLITS:
        if name in splits:
            size_px = _decode(config, name, splits[name].within(config.max_sample_mib), size_px)


def _end_with_owner() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def _decode(config: DataConfig, name: str, manifest: Manifest, size_px: int | None) -> int:
    """Decode one split into the cache; returns the side of its images."""
    limits = ImageLimits.of(config)
    size_px = size_px or side_of_first(manifest, BadSamples(manifest, len(manifest), None), limits)
    fits = len(manifest) * 3 * size_px * size_px <= _MAX_BYTES
    if not fits or choose_regime(config, name, manifest, size_px) != "resident":
        return size_px
    cache, key = DecodedCache.of(config), key_of_split(config, manifest, size_px)
    if key is not None and not cache.path(key).exists():
        threads = config.decode_threads or host.usable_cores()
        images, _ = decode_all(
            manifest, None, size_px, resize_of(config), threads, max_bad_fraction=None,
            limits=limits,
        )  # fmt: skip
        cache.store(key, images)
    return size_px
