"""One split as images: held in memory, decoded, or read when they are needed."""

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from lightship import storage
from lightship.config import DataConfig
from lightship.data import decode_ahead
from lightship.data.bad_samples import BadSamples
from lightship.data.decoded_cache import DecodedCache, key_of_split
from lightship.data.images.limits import ImageLimits
from lightship.data.manifest import Manifest
from lightship.data.regime import choose_regime, resize_of, side_of_first
from lightship.data.resident import ResidentSplit
from lightship.data.sample_decoder import SampleDecoder, decode_all
from lightship.data.streaming.deaths import Deaths
from lightship.data.streaming.loaders import StreamedSplit, read_all
from lightship.distributed import comm
from lightship.errors import DataError

_CPU = torch.device("cpu")
_WORKER_BYTES = 64 * 2**20
"""A resident split of less is decoded before the worker would have started."""


class ImageSplit:
    """A split whose regime is chosen; if that is resident, its images are decoded. Blocks.

    Args:
        config: The data section.
        name: Of the split.
        manifest: Its samples.
        size_px: Side of its images; None: that of the first one that can be read.

    Attributes:
        size_px: Side of its images in pixels.
        bad: Those of its images that cannot be read.
        is_streamed: Whether it is read batch by batch.
        decoded: [N, S, S, 3] uint8, black where bad; None: the split is streamed.

    Raises:
        DataError: An image cannot be read (or too many, with on_error=skip), or sizes differ.
        ConfigError: data.mode does not suit the split.
    """

    def __init__(
        self, config: DataConfig, name: str, manifest: Manifest, size_px: int | None
    ) -> None:
        if name != "predict" and (unlabelled := manifest.first_unlabelled) is not None:
            raise DataError(
                f"{name} image without a label: {manifest.name(unlabelled)} (--data.root)"
            )
        self.config, self.manifest = config, manifest
        self._limits = ImageLimits.of(config)
        max_bad_fraction = config.max_bad_fraction if config.on_error == "skip" else None
        self.bad = BadSamples(manifest, len(manifest), max_bad_fraction)
        self.size_px = size_px or side_of_first(manifest, self.bad, self._limits)
        self.decoded: torch.Tensor | None = None
        self._deaths = Deaths()
        self.is_streamed = choose_regime(config, name, manifest, self.size_px) == "streaming"
        if not self.is_streamed:
            self.decoded = torch.from_numpy(self._load_or_decode(max_bad_fraction))

    def _load_or_decode(self, max_bad_fraction: float | None) -> np.ndarray:
        """All images, [N, S, S, 3] uint8, from the cache if they are there. Blocks.

        They are stored in the background, by one rank of the node, if all could be read.
        """
        cache = DecodedCache.of(self.config)
        content = decode_ahead.content_of(self.manifest)
        key = key_of_split(self.config, self.manifest, self.size_px, content)
        if key is not None:
            decode_ahead.wait_for(cache.path(key))
            shape = len(self.manifest), self.size_px, self.size_px, 3
            if (cached := cache.load(key, shape)) is not None:
                return cached
        images, self.bad = self._decode(None, max_bad_fraction)
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        if key is not None and is_first and not self.bad.reasons:
            storage.in_daemon(partial(cache.store, key, images))
        return images

    def _decode(
        self, ids: np.ndarray | None, max_bad_fraction: float | None
    ) -> tuple[np.ndarray, BadSamples]:
        """([K, S, S, 3] uint8 of `ids`, or of all, black where bad; the bad ones). Blocks."""
        if self._is_for_worker(ids):
            bad = BadSamples(self.manifest, len(self.manifest), max_bad_fraction)
            split = replace(self._streamed(_CPU), bad=bad)
            if ids is None:
                return read_all(split, np.arange(len(self.manifest))), bad
            each, places = np.unique(ids, return_inverse=True)
            return read_all(split, each)[places], bad
        return decode_all(
            self.manifest,
            ids,
            image_size_px=self.size_px,
            resize=resize_of(self.config),
            threads=self._threads,
            max_bad_fraction=max_bad_fraction,
            limits=self._limits,
        )

    def _is_for_worker(self, ids: np.ndarray | None) -> bool:
        """Whether to decode in the worker's process, which may die of an image."""
        manifest = self.manifest
        if manifest.container == "gzip" or storage.is_private(manifest.root):
            return False
        if manifest.encoding != "image" or (ids is not None and not len(ids)):
            return False
        size_bytes = manifest.size_bytes if ids is None else int(manifest.length[ids].sum())
        return self.is_streamed or size_bytes >= _WORKER_BYTES

    @property
    def _threads(self) -> int:
        return self.config.decode_threads or comm.cores()

    @property
    def unreadable(self) -> Mapping[int, str]:
        """Why images cannot be read, by id, as far as this rank has found out: it grows."""
        return self.bad.reasons

    def spread(self, count: int) -> np.ndarray:
        """[K] ids of at most `count` samples, evenly spaced."""
        size = len(self.manifest)
        return np.linspace(0, size - 1, min(count, size)).astype(np.int64)

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([K, S, S, 3] uint8, [K] ids): the readable ones of `ids`. Blocks."""
        if self.decoded is not None:
            images = self.decoded[torch.from_numpy(ids).to(self.decoded.device)].cpu().numpy()
            bad = self.bad
        else:
            images, bad = self._decode(ids, 1.0 if self.config.on_error == "skip" else None)
        is_good = ~np.isin(ids, list(bad.reasons))
        return images[is_good], ids[is_good]

    def on(self, device: torch.device) -> ResidentSplit | StreamedSplit:
        """The split as a loader takes it. Called once; the host keeps no copy of what CUDA has."""
        if self.decoded is None:
            return self._streamed(device)
        is_bad = np.isin(np.arange(len(self.manifest)), list(self.bad.reasons))
        labels = self.manifest.label.astype(np.int64)
        held = ResidentSplit.from_arrays(self.decoded.numpy(), labels, is_bad, device)
        if device.type == "cuda":
            self.decoded = held.pixels
        return held

    def _streamed(self, device: torch.device) -> StreamedSplit:
        is_remote = storage.is_remote(self.manifest.root)
        return StreamedSplit(
            SampleDecoder(self.manifest, self.size_px, resize_of(self.config), self._limits),
            threads=self._threads,
            budget_bytes=int(self.config.prefetch_gib * 2**30),
            cache_bytes=int(self.config.cache_gib * 2**30) if is_remote else 0,
            bad=self.bad,
            device=device,
            deaths=self._deaths,
        )
