"""Lists and decodes a local set that memory holds while the command imports torch, for seconds.

A process of its own, without torch, scans the images and sends where their table lies; then it
decodes them into the cache of decoded splits, where `ImageSplit` finds them. If it fails (a damaged
image, a full disk), it ends without a message: the command does the rest itself, and reports the
error.
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
from queue import SimpleQueue
from typing import Any

from lightship import host, storage
from lightship.config import NAMED_SETS, DataConfig
from lightship.data import decoded_cache, table_cache
from lightship.data.bad_samples import BadSamples
from lightship.data.decoded_cache import DecodedCache, key_of_split
from lightship.data.images.limits import ImageLimits
from lightship.data.manifest import LABELLED_SPLITS, Manifest
from lightship.data.manifest_table import open_table
from lightship.data.regime import choose_regime, is_streamed, resize_of, side_of_first
from lightship.data.sample_decoder import decode_all
from lightship.data.scanned_table import scan_to_table
from lightship.data.sources.roots import resolve_root
from lightship.data.streaming.worker_process import spawn
from lightship.data.table_cache import Table

logger = logging.getLogger(__name__)
_MAX_BYTES = 512 * 2**20
"""Of a decoded split: until it is written, this process holds it beside the disk's cache."""
_LOOK_EVERY_S = 0.02
_running: "_Ahead | None" = None


class _Ahead:
    """The process, and what it has sent so far.

    Args:
        process: Of `main`.
        config: What it was started with.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", config: DataConfig) -> None:
        self.process = process
        self.source: tuple[object, ...] = _source(config)
        self.scan: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        """Messages of the scan: log lines, and last the table; None: it has ended without one."""
        self.contents: dict[str, str] = {}
        """Fingerprint of a split -> `decoded_cache.content_of` it."""
        storage.in_daemon(self._listen)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                message = json.loads(line)
                if "fingerprint" in message:
                    self.contents[message["fingerprint"]] = message["content"]
                else:
                    self.scan.put(message)
        finally:
            self.scan.put(None)


def _source(config: DataConfig) -> tuple[object, ...]:
    """What a table follows from."""
    return config.root, config.root_md5, config.val_fraction


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


def forget() -> None:
    """End of the command: what was found for it may have changed when this process runs another."""
    global _running
    _running = None


def _start(config: DataConfig) -> None:
    global _running
    process = spawn(
        "from lightship.data.decode_ahead import main; main()",
        config.root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    _running = _Ahead(process, config)
    assert process.stdin is not None
    # The pipe stays open: its end tells that process that this one has ended.
    process.stdin.write(json.dumps(dataclasses.asdict(config)).encode() + b"\n")
    process.stdin.flush()


def scanned(config: DataConfig) -> Table | None:
    """The table of the splits at data.root, once; None: the process has none.

    Blocks as scanning does, whose deadlines hold in that process. Logs what the scan logs.
    """
    ahead = _running
    if ahead is None or ahead.source != _source(config):
        return None
    ahead.source = ()
    warnings = []
    while message := ahead.scan.get():
        if "log" in message and message["log"][1] < logging.WARNING:
            _log(*message["log"])
        elif "log" in message:  # of a scan that fails, the next one has them too
            warnings.append(message["log"])
        else:
            digest, size_bytes = message["table"]
            table = Table(digest, size_bytes, None)
            if table_cache.local_copy(table) is None:
                return None
            for warning in warnings:
                _log(*warning)
            return table
    return None


def _log(name: str, level: int, text: str) -> None:
    logging.getLogger(name).log(level, "%s", text)


def content_of(manifest: Manifest) -> str | None:
    """`decoded_cache.content_of` a split, if the process has sent it. Does not block."""
    return None if _running is None else _running.contents.get(manifest.fingerprint())


def wait_for(path: Path) -> None:
    """Wait until a file is there that the process, if one was begun, may yet write. Blocks."""
    if _running is None:
        return
    ends_s = time.monotonic() + storage.Limits.now().total_s
    while _running.process.poll() is None and not path.exists():
        if time.monotonic() > ends_s:
            return
        time.sleep(_LOOK_EVERY_S)
    with contextlib.suppress(OSError):  # not there: it failed
        ago_s = time.time() - path.stat().st_mtime
        logger.debug(f"images were decoded {ago_s:.3f} s ago")


def main() -> None:
    """Scan and decode all splits of the settings on standard input, those for training first."""
    config = DataConfig(**json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_owner, daemon=True).start()
    table = _scan(config)
    splits = open_table(table_cache.fetch(table))
    root, size_px = resolve_root(config.root, config.root_md5), config.image_size_px
    for name in LABELLED_SPLITS:
        if name in splits:
            split = dataclasses.replace(splits[name], root=root).within(config.max_sample_mib)
            size_px = _decode(config, name, split, size_px)


def _scan(config: DataConfig) -> Table:
    """The table, which is sent; so is what is logged meanwhile."""
    handler, package = _Sender(), logging.getLogger("lightship")
    package.addHandler(handler)
    package.setLevel(logging.DEBUG)
    table = scan_to_table(config)
    package.removeHandler(handler)
    _send({"table": (table.digest, table.size_bytes)})
    return table


class _Sender(logging.Handler):
    """Sends log lines to the command."""

    def emit(self, record: logging.LogRecord) -> None:
        """Send one."""
        _send({"log": (record.name, record.levelno, record.getMessage())})


def _send(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


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
    cache, content = DecodedCache.of(config), decoded_cache.content_of(manifest)
    if content is not None:
        _send({"fingerprint": manifest.fingerprint(), "content": content})
    key = key_of_split(config, manifest, size_px, content)
    if key is not None and not cache.path(key).exists():
        threads = config.decode_threads or host.usable_cores()
        images, _ = decode_all(
            manifest, None, size_px, resize_of(config), threads, max_bad_fraction=None,
            limits=limits,
        )  # fmt: skip
        cache.store(key, images)
    return size_px
