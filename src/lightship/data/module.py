"""The LightningDataModule: from the data section of a config to the loaders of a trainer."""

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from lightship import ranks, storage
from lightship.batch import Batch
from lightship.config import DataConfig
from lightship.data import read, sources
from lightship.data.augment import Augment
from lightship.data.manifest import Manifest, load_manifests, save_manifests, split_validation
from lightship.data.order import Order
from lightship.data.resident import ResidentEvalLoader, ResidentSplit, ResidentTrainLoader
from lightship.exits import ConfigError, DataError

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class ImageData(LightningDataModule):
    """Images at a URL, as training and evaluation batches on the trainer's device.

    Nothing is read until `load_manifests` (once, the table of samples) and `decode` (per split).

    Args:
        config: The data section.
        seed: The run's seed (order, augmentation).
        accumulate: Parts each device's share of a global batch is cut into.
        say: Prints a line for the user.
    """

    def __init__(
        self, config: DataConfig, seed: int, accumulate: int, say: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.config, self.seed, self.accumulate, self.say = config, seed, accumulate, say
        self.manifests: dict[str, Manifest] = {}
        self.skipped: dict[str, list[str]] = {}
        self.image_size_px = config.image_size_px or 0
        self._decoded: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._on_device: dict[str, ResidentSplit] = {}

    @property
    def class_names(self) -> list[str]:
        """The classes in label order."""
        return next(iter(self.manifests.values())).class_names

    def load_manifests(self, cache_url: str | None, need: str) -> None:
        """Find out what samples exist. Every rank; rank 0 reads the cached table or scans. Blocks.

        Args:
            cache_url: Folder that keeps the table beside the run, or None to scan anew.
            need: The split that must be there ("train", "val" or "test").

        Raises:
            DataError: No such split, or nothing to train on.
        """
        config = self.config
        key = hashlib.sha256(f"{config.root}\n{config.root_md5}".encode()).hexdigest()[:12]
        url = storage.join(cache_url, f"manifest-{key}.npz") if cache_url else None

        def table() -> dict[str, Manifest]:
            if url and storage.exists(url):
                return load_manifests(url)
            found = sources.scan(config.root, config.root_md5)
            if url:
                save_manifests(url, found)
            return found

        splits = self._at_root_here(ranks.from_rank_0(table))
        if "val" not in splits and "train" in splits and config.val_fraction > 0:
            train, val = split_validation(splits["train"], config.val_fraction)
            splits = {**splits, "train": train}
            if val is not None:
                splits["val"] = val
        if need not in splits:
            raise DataError(
                f"no {need} split at --data.root {storage.redact(config.root)}: "
                f"found {', '.join(sorted(splits)) or 'nothing'}"
            )
        self.manifests = splits

    def load_unlabelled(self) -> None:
        """Take every image under data.root as the split `predict`. Every rank; blocks.

        Raises:
            DataError: No images there.
        """
        config = self.config
        scan = partial(sources.scan_images, config.root, config.root_md5)
        self.manifests = self._at_root_here({"predict": ranks.from_rank_0(scan)})

    def _at_root_here(self, splits: dict[str, Manifest]) -> dict[str, Manifest]:
        """A table holds for every machine; where a downloaded archive lies does not."""
        config = self.config
        resolve = partial(sources.resolve_root, config.root, config.root_md5)
        root = ranks.first_on_each_node(resolve)
        return {split: dataclasses.replace(table, root=root) for split, table in splits.items()}

    def decode(self, split: str) -> None:
        """Read and decode a split into memory (kept; the second call does nothing). Blocks.

        Raises:
            DataError: An image cannot be read (or too many, with on_error=skip), sizes differ.
            ConfigError: The decoded split is larger than data.resident_gib.
        """
        if split in self._decoded:
            return
        config, manifest = self.config, self.manifests[split]
        self._check_size(split)
        images, bad = read.decode_all(
            manifest,
            image_size_px=self.image_size_px or None,
            threads=config.decode_threads or ranks.cores(),
            on_error=config.on_error,
            max_bad_fraction=config.max_bad_fraction,
        )
        if split != "predict" and (manifest.label < 0).any():
            name = manifest.name(int(np.argmax(manifest.label < 0)))
            raise DataError(f"{split} image without a label: {name} (--data.root)")
        self.image_size_px = images.shape[-1]
        self._decoded[split] = images, bad
        self.skipped[split] = [manifest.name(int(i)) for i in np.flatnonzero(bad)]
        if self.skipped[split]:
            self.say(f"{split}: {bad.sum()} of {len(bad)} images could not be read and are skipped")

    def _check_size(self, split: str) -> None:
        """Refuse what does not fit in memory before anything large is read."""
        config, manifest = self.config, self.manifests[split]
        if config.mode == "streaming":
            raise ConfigError("--data.mode streaming is not available yet; use resident")
        size = self.image_size_px
        if not size:
            _, first = next(iter(read.read_samples(manifest, np.array([0]))))
            if isinstance(first, Exception):
                return  # decode_all tells of it, or skips it
            size = read.decode(first, manifest.encoding).shape[-1]
        gib = len(manifest) * 3 * size * size / 2**30
        if gib > config.resident_gib:
            raise ConfigError(
                f"the {split} split decodes to {gib:.1f} GiB at {size} px, more than "
                f"--data.resident_gib {config.resident_gib:g}: raise it or lower "
                "--data.image_size_px"
            )

    def pixel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation a channel, in 0..1, as data.normalize asks for."""
        if self.config.normalize == "imagenet":
            return IMAGENET_MEAN, IMAGENET_STD
        if self.config.normalize == "none":
            return [0.0] * 3, [1.0] * 3
        images, bad = self._decoded["train"]
        # Whole-number histograms: exact, so the same on every machine and rank.
        histogram = np.zeros((3, 256), dtype=np.int64)
        for chunk in np.array_split(np.flatnonzero(~bad), max(1, len(images) // 4096)):
            for channel in range(3):
                flat = images[chunk, channel].ravel()
                histogram[channel] += np.bincount(flat, minlength=256)
        weight = histogram / histogram.sum(1, keepdims=True)
        level = np.arange(256) / 255
        mean = weight @ level
        std = np.sqrt(np.maximum(weight @ level**2 - mean**2, 0))
        return mean.tolist(), np.maximum(std, 1 / 255).tolist()

    def train_dataloader(self) -> ResidentTrainLoader:
        """Training batches from wherever the trainer stands."""
        assert self.trainer is not None
        trainer, config = self.trainer, self.config
        order = Order(len(self.manifests["train"]), config.global_batch_size, self.seed)
        if order.dropped_per_epoch:
            self.say(
                f"train: {order.steps_per_epoch} batches of {config.global_batch_size} an epoch; "
                f"{order.dropped_per_epoch} of {order.num_samples} images sit out each epoch "
                "(others every time)"
            )
        augment = Augment(
            self.seed,
            crop_padding_px=config.crop_padding_px,
            flip=config.flip,
            cutout_px=config.cutout_px,
            mixup_alpha=config.mixup_alpha,
            cutmix_alpha=config.cutmix_alpha,
        )
        per_device = config.global_batch_size // trainer.world_size // self.accumulate
        if augment.mixes and per_device % 2:
            raise ConfigError(
                f"mixup and cutmix mix pairs: the device's batch is {per_device} "
                "(--data.global_batch_size / devices / parts); it must be even"
            )
        if config.crop_padding_px >= self.image_size_px:
            raise ConfigError(
                f"--data.crop_padding_px is {config.crop_padding_px}; it must be less than the "
                f"image's {self.image_size_px} px"
            )

        def position() -> tuple[int, int]:
            return trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready

        return ResidentTrainLoader(
            self._resident("train"),
            order,
            augment,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            parts=self.accumulate,
            position=position,
        )

    def val_dataloader(self) -> ResidentEvalLoader | list:
        """Every validation image once; nothing without a val split."""
        return self._eval_loader("val") if "val" in self.manifests else []

    def test_dataloader(self) -> ResidentEvalLoader:
        """Every test image once."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> ResidentEvalLoader:
        """Every image once."""
        return self._eval_loader("predict")

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Nothing to move: resident batches are cut on the device."""
        return batch

    def examples(self, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`count` images spread evenly over a split: uint8 [K,3,S,S], labels [K], ids [K], CPU."""
        images, bad = self._decoded[split]
        good = np.flatnonzero(~bad)
        ids = good[np.linspace(0, len(good) - 1, min(count, len(good))).astype(int)]
        labels = self.manifests[split].label[ids]
        return torch.from_numpy(images[ids]), torch.from_numpy(labels), torch.from_numpy(ids)

    def _eval_loader(self, split: str) -> ResidentEvalLoader:
        assert self.trainer is not None
        size, rank = self.config.eval_batch_size, self.trainer.global_rank
        return ResidentEvalLoader(self._resident(split), size, rank, self.trainer.world_size)

    def _resident(self, split: str) -> ResidentSplit:
        assert self.trainer is not None
        if split not in self._on_device:
            self.decode(split)
            images, bad = self._decoded[split]
            device = self.trainer.strategy.root_device
            labels = self.manifests[split].label
            self._on_device[split] = ResidentSplit.from_arrays(images, labels, bad, device)
        return self._on_device[split]
