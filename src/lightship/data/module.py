"""The LightningDataModule: from the data section of a config to the loaders of a trainer."""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from lightship import devices, storage
from lightship.config import DataConfig
from lightship.data import sample_reader
from lightship.data.augment import Augment
from lightship.data.bad_samples import BadSamples, compare_ranks
from lightship.data.batch import Batch
from lightship.data.images.decode import PixelLimit
from lightship.data.images.resize import channel_statistics
from lightship.data.manifest import Manifest, load_manifests, save_manifests, split_validation
from lightship.data.order import EvalShare, ListedShare, Order, TrainShare
from lightship.data.regime import is_streamed, side_of_first
from lightship.data.resident import ResidentEvalLoader, ResidentSplit, ResidentTrainLoader
from lightship.data.sources import layouts
from lightship.data.streaming.loaders import StreamedEvalLoader, StreamedSplit, StreamedTrainLoader
from lightship.data.streaming.prefetch import BatchRange
from lightship.distributed import comm
from lightship.errors import ConfigError, DataError

logger = logging.getLogger(__name__)
_STATISTICS_IMAGES, _STATISTICS_AT_ONCE = 1024, 128
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class ImageData(LightningDataModule):
    """Images at a URL, as training and evaluation batches on the trainer's device.

    Nothing is read until `load_manifests` (once, the table of samples) and `prepare` (per split),
    which decides whether a split is held in memory, decoded, or streamed.

    Args:
        config: The data section.
        seed: The run's seed (order, augmentation).
        accumulate: Parts each device's share of a global batch is cut into.
    """

    supports_fast_loop = True  # a promise: see training/fast_loop.py

    def __init__(self, config: DataConfig, seed: int, accumulate: int) -> None:
        super().__init__()
        self.config, self.seed, self.accumulate = config, seed, accumulate
        self.manifests: dict[str, Manifest] = {}
        self.image_size_px = config.image_size_px or 0
        self._limit = PixelLimit(config.max_image_pixels)
        self._bad: dict[str, BadSamples] = {}
        self._decoded: dict[str, tuple[torch.Tensor, np.ndarray]] = {}
        self._splits: dict[str, ResidentSplit | StreamedSplit] = {}
        self._train_loader: StreamedTrainLoader | None = None
        self._chosen: ListedShare | None = None

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
            NewerVersion: The cached table is of a newer version.
        """
        config = self.config
        key = hashlib.sha256(f"{config.root}\n{config.root_md5}".encode()).hexdigest()[:12]
        url = storage.join(cache_url, f"manifest-{key}.npz") if cache_url else None

        def table() -> dict[str, Manifest]:
            if url and storage.exists(url):
                try:
                    return load_manifests(url)
                except DataError as error:  # the data themselves tell all that was in it
                    logger.warning(f"{error}; scanning --data.root again")
            found = layouts.scan(config.root, config.root_md5)
            if url:
                save_manifests(url, found)
            return found

        splits = self._at_root_here(comm.broadcast_from_rank_0(table))
        if "val" not in splits and "train" in splits and config.val_fraction > 0:
            train, val = split_validation(splits["train"], config.val_fraction)
            splits = {**splits, "train": train}
            if val is not None:
                splits["val"] = val
        if need not in splits:
            instead = (
                "; lightship validate measures val" if need == "test" and "val" in splits else ""
            )
            raise DataError(
                f"no {need} split at --data.root {storage.redact(config.root)}: "
                f"found {', '.join(sorted(splits)) or 'nothing'}{instead}"
            )
        self.manifests = splits

    def load_unlabelled(self, leave_out: Sequence[str] = ()) -> None:
        """Take every image under data.root as the split `predict`. Every rank; blocks.

        Args:
            leave_out: URLs of files that the command itself writes.

        Raises:
            DataError: No images there.
        """
        config = self.config
        scan = partial(layouts.scan_images, config.root, config.root_md5, leave_out)
        self.manifests = self._at_root_here({"predict": comm.broadcast_from_rank_0(scan)})

    def choose_unlabelled(self, batches: np.ndarray) -> None:
        """Have the split `predict` come in these batches on this rank, [K, B] ids, and ready it."""
        self._chosen = ListedShare(batches)
        self.prepare("predict")

    def _at_root_here(self, splits: dict[str, Manifest]) -> dict[str, Manifest]:
        """A table holds for every machine; where a downloaded archive lies does not."""
        config = self.config
        resolve = partial(layouts.resolve_root, config.root, config.root_md5)
        root = comm.local_rank_0_first(resolve)
        return {split: dataclasses.replace(table, root=root) for split, table in splits.items()}

    @property
    def skipped(self) -> list[str]:
        """The images that this rank could not read and left out, of all splits, and why."""
        return [told for bad in self._bad.values() for told in bad.told.values()]

    def readable(self, split: str) -> int:
        """Images of a split, without those that are known to be bad by now."""
        bad = self._bad.get(split)
        return len(self.manifests[split]) - (len(bad.told) if bad else 0)

    def unreadable(self, split: str) -> Mapping[int, str]:
        """Those of a prepared split by id, and why: as this rank meets them, it grows."""
        return self._bad[split].told

    @property
    def _streamed_bad(self) -> dict[str, BadSamples]:
        """Of a streamed split a rank meets its share only; a resident one each rank decodes."""
        return {split: bad for split, bad in self._bad.items() if split not in self._decoded}

    def count_bad_samples(self) -> None:
        """Count the bad samples of all ranks, see `compare_ranks`. Every rank; blocks."""
        if self.config.on_error == "skip":
            compare_ranks(self._streamed_bad)
            self._show_bad_samples()

    def _show_bad_samples(self) -> None:
        for split, bad in self._bad.items():
            if line := bad.take_line():
                logger.info(f"{split}: {line}")

    def state_dict(self) -> dict[str, Any]:
        """The bad samples so far, so that a restart counts on. Every rank; blocks."""
        self.count_bad_samples()
        return {split: bad.state_dict() for split, bad in self._streamed_bad.items() if bad.told}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from what a checkpoint knows. Every rank, after `prepare`."""
        for split, bad in self._streamed_bad.items():
            if split in state_dict:
                bad.load_state_dict(state_dict[split])

    def prepare(self, split: str) -> None:
        """Make a split ready: hold it in memory, decoded, or find out how to stream it. Blocks.

        The second call does nothing. Every rank.

        Raises:
            DataError: An image cannot be read (or too many, with on_error=skip), sizes differ.
            ConfigError: data.mode does not suit the split.
        """
        if split in self._bad:
            return
        config, manifest = self.config, self.manifests[split]
        if split != "predict" and (manifest.label < 0).any():
            name = manifest.name(int(np.argmax(manifest.label < 0)))
            raise DataError(f"{split} image without a label: {name} (--data.root)")
        most = config.max_bad_fraction if config.on_error == "skip" else None
        bad_samples = BadSamples(manifest, len(manifest), most)
        if not self.image_size_px:
            self.image_size_px = side_of_first(manifest, bad_samples, self._limit)
        if is_streamed(config, split, manifest, self.image_size_px):
            self._bad[split] = bad_samples
            return
        images, bad_samples = sample_reader.decode_all(
            manifest,
            image_size_px=self.image_size_px,
            resize=config.image_size_px is not None,
            threads=self._threads(),
            max_bad_fraction=most,
            limit=self._limit,
        )
        bad = np.isin(np.arange(len(manifest)), list(bad_samples.told))
        self._decoded[split] = torch.from_numpy(images), bad
        self._bad[split] = bad_samples
        self._show_bad_samples()

    def _threads(self) -> int:
        return self.config.decode_threads or comm.cores()

    def pixel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation a channel, in 0..1, as data.normalize asks for. Every rank; blocks.

        auto: of 1,024 images spread evenly over train, the same however the set is read.
        """
        if self.config.normalize == "imagenet":
            return IMAGENET_MEAN, IMAGENET_STD
        if self.config.normalize == "none":
            return [0.0] * 3, [1.0] * 3
        ids = self._evenly("train", _STATISTICS_IMAGES)
        parts = -(-len(ids) // _STATISTICS_AT_ONCE)
        return channel_statistics(self._read("train", ids[at::parts])[0] for at in range(parts))

    def examples(self, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`count` images spread evenly over a split: uint8 [K,3,S,S], labels [K], ids [K], CPU.

        Blocks. Fewer if some of them cannot be read.
        """
        images, ids = self._read(split, self._evenly(split, count))
        labels = self.manifests[split].label[ids]
        batch = torch.from_numpy(images).permute(0, 3, 1, 2)
        return batch, torch.from_numpy(labels), torch.from_numpy(ids)

    def images(self, split: str, ids: np.ndarray) -> dict[int, np.ndarray]:
        """The pixels of some samples by id, [S, S, 3] uint8, without those that cannot be read.

        This rank alone; blocks.
        """
        images, readable = self._read(split, ids)
        return dict(zip(readable.tolist(), images, strict=True))

    def _evenly(self, split: str, count: int) -> np.ndarray:
        """`count` ids of a split at even distances."""
        size = len(self.manifests[split])
        return np.linspace(0, size - 1, min(count, size)).astype(np.int64)

    def _read(self, split: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([K, S, S, 3] uint8, [K] ids): the readable ones of `ids`."""
        self.prepare(split)
        if split in self._decoded:
            held, bad = self._decoded[split][0], self._decoded[split][1][ids]
            images = held[torch.from_numpy(ids).to(held.device)].cpu().numpy()
        else:
            most = 1.0 if self.config.on_error == "skip" else None
            images, bad_samples = sample_reader.decode_all(
                self.manifests[split],
                ids,
                image_size_px=self.image_size_px,
                resize=self.config.image_size_px is not None,
                threads=self._threads(),
                max_bad_fraction=most,
                limit=self._limit,
            )
            bad = np.isin(ids, list(bad_samples.told))
        return images[~bad], ids[~bad]

    def train_dataloader(self) -> ResidentTrainLoader | StreamedTrainLoader:
        """Training batches from wherever the trainer stands."""
        assert self.trainer is not None
        trainer, config = self.trainer, self.config
        manifest = self.manifests["train"]
        order = Order(len(manifest), config.global_batch_size, self.seed)
        if not manifest.is_small:
            order.read_in_blocks(manifest.block_edges(), int(manifest.length.sum()))
        if order.dropped_per_epoch:
            logger.info(
                f"train: {order.steps_per_epoch} batches of {config.global_batch_size} an epoch; "
                f"the last, incomplete one ({order.dropped_per_epoch} of {order.num_samples} "
                "images, others every time) is left out"
            )
        augment = Augment(
            self.seed,
            crop_padding_px=config.crop_padding_px,
            flip=config.flip,
            flip_in_turn=config.flip_in_turn,
            cutout_px=config.cutout_px,
            mixup_alpha=config.mixup_alpha,
            cutmix_alpha=config.cutmix_alpha,
        )
        chips = devices.of(trainer.strategy.root_device).chips
        per_device, rest = divmod(
            config.global_batch_size, trainer.world_size * chips * self.accumulate
        )
        if chips > 1 and rest:
            raise ConfigError(
                f"--data.global_batch_size {config.global_batch_size} is not divisible by the "
                f"{trainer.world_size * chips} devices (and {self.accumulate} parts)"
            )
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

        share = TrainShare(order, trainer.global_rank, trainer.world_size, self.accumulate)
        split = self._split("train")
        progress = trainer.fit_loop.epoch_loop.batch_progress.current

        if isinstance(split, ResidentSplit):
            return ResidentTrainLoader(
                split, share, augment, lambda: (trainer.current_epoch, progress.ready)
            )

        def stretch() -> BatchRange:
            last = trainer.max_epochs
            batches = min(len(share), int(trainer.num_training_batches))
            epochs = last if last is not None and last >= 0 else None
            return BatchRange(trainer.current_epoch, progress.ready, batches, epochs)

        loader = StreamedTrainLoader(split, share, augment, config.crop_min_area, stretch)
        self._train_loader = loader
        return loader

    def val_dataloader(self) -> ResidentEvalLoader | StreamedEvalLoader | list:
        """Every validation image once; nothing without a val split."""
        return self._eval_loader("val") if "val" in self.manifests else []

    def test_dataloader(self) -> ResidentEvalLoader | StreamedEvalLoader:
        """Every test image once."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> ResidentEvalLoader | StreamedEvalLoader:
        """The chosen batches, each image once."""
        assert self._chosen is not None
        return self._loader("predict", self._chosen)

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Nothing to move: the loaders make batches on the device."""
        return batch

    def teardown(self, stage: str) -> None:
        """End what reads ahead."""
        if stage == "fit" and self._train_loader is not None:
            self._train_loader.close()

    def _eval_loader(self, split: str) -> ResidentEvalLoader | StreamedEvalLoader:
        assert self.trainer is not None
        trainer = self.trainer
        size = self.config.eval_batch_size * devices.of(trainer.strategy.root_device).chips
        share = EvalShare(len(self.manifests[split]), size, trainer.global_rank, trainer.world_size)
        return self._loader(split, share)

    def _loader(
        self, split: str, share: EvalShare | ListedShare
    ) -> ResidentEvalLoader | StreamedEvalLoader:
        source = self._split(split)
        if isinstance(source, ResidentSplit):
            return ResidentEvalLoader(source, share)
        return StreamedEvalLoader(source, share)

    def _split(self, split: str) -> ResidentSplit | StreamedSplit:
        assert self.trainer is not None
        if split not in self._splits:
            self.prepare(split)
            manifest, device = self.manifests[split], self.trainer.strategy.root_device
            is_remote = storage.is_remote(manifest.root)
            if split in self._decoded:
                images, bad = self._decoded[split]
                held = ResidentSplit.from_arrays(images.numpy(), manifest.label, bad, device)
                if device.type == "cuda":  # the host's copy is not needed any more
                    self._decoded[split] = held.pixels, bad
                source: ResidentSplit | StreamedSplit = held
            else:
                source = StreamedSplit(
                    manifest,
                    self.image_size_px,
                    resize=self.config.image_size_px is not None,
                    threads=self._threads(),
                    budget_bytes=int(self.config.prefetch_gib * 2**30),
                    cache_bytes=int(self.config.cache_gib * 2**30) if is_remote else 0,
                    bad=self._bad[split],
                    device=device,
                    limit=self._limit,
                )
            self._splits[split] = source
        return self._splits[split]
