"""One split as images: held in memory, decoded, or read when they are needed."""

from collections.abc import Mapping

import numpy as np
import torch

from lightship import storage
from lightship.config import DataConfig
from lightship.data.bad_samples import BadSamples
from lightship.data.images.decode import PixelLimit
from lightship.data.manifest import Manifest
from lightship.data.regime import choose_regime, side_of_first
from lightship.data.resident import ResidentSplit
from lightship.data.sample_decoder import SampleDecoder, decode_all
from lightship.data.streaming.loaders import StreamedSplit
from lightship.distributed import comm
from lightship.errors import DataError


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
        decoded: [N, S, S, 3] uint8, black where bad; None: the split is streamed.

    Raises:
        DataError: An image cannot be read (or too many, with on_error=skip), or sizes differ.
        ConfigError: data.mode does not suit the split.
    """

    def __init__(
        self, config: DataConfig, name: str, manifest: Manifest, size_px: int | None
    ) -> None:
        if name != "predict" and (manifest.label < 0).any():
            unlabelled = manifest.name(int(np.argmax(manifest.label < 0)))
            raise DataError(f"{name} image without a label: {unlabelled} (--data.root)")
        self.config, self.manifest = config, manifest
        self._limit = PixelLimit(config.max_image_pixels)
        max_bad_fraction = config.max_bad_fraction if config.on_error == "skip" else None
        self.bad = BadSamples(manifest, len(manifest), max_bad_fraction)
        self.size_px = size_px or side_of_first(manifest, self.bad, self._limit)
        self.decoded: torch.Tensor | None = None
        if choose_regime(config, name, manifest, self.size_px) == "resident":
            images, self.bad = self._decode(None, max_bad_fraction)
            self.decoded = torch.from_numpy(images)

    def _decode(
        self, ids: np.ndarray | None, max_bad_fraction: float | None
    ) -> tuple[np.ndarray, BadSamples]:
        return decode_all(
            self.manifest,
            ids,
            image_size_px=self.size_px,
            resize=self.config.image_size_px is not None,
            threads=self._threads,
            max_bad_fraction=max_bad_fraction,
            limit=self._limit,
        )

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
            is_remote = storage.is_remote(self.manifest.root)
            resize = self.config.image_size_px is not None
            return StreamedSplit(
                SampleDecoder(self.manifest, self.size_px, resize, self._limit),
                threads=self._threads,
                budget_bytes=int(self.config.prefetch_gib * 2**30),
                cache_bytes=int(self.config.cache_gib * 2**30) if is_remote else 0,
                bad=self.bad,
                device=device,
            )
        is_bad = np.isin(np.arange(len(self.manifest)), list(self.bad.reasons))
        labels = self.manifest.label
        held = ResidentSplit.from_arrays(self.decoded.numpy(), labels, is_bad, device)
        if device.type == "cuda":
            self.decoded = held.pixels
        return held
