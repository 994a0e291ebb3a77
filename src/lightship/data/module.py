"""The LightningDataModule: from the data section of a config to the loaders of a trainer."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from lightship import devices, versions
from lightship.config import DataConfig
from lightship.data.bad_samples import BadSamples
from lightship.data.batch import Batch
from lightship.data.image_split import ImageSplit
from lightship.data.images.resize import channel_statistics
from lightship.data.manifest import Manifest
from lightship.data.order_versions import FIRST, NEWEST, order_of
from lightship.data.resident import ResidentEvalLoader, ResidentSplit, ResidentTrainLoader
from lightship.data.shares import EvalShare, ListedShare, TrainShare
from lightship.data.size_schedule import SizeSchedule
from lightship.data.streaming.loaders import StreamedEvalLoader, StreamedSplit, StreamedTrainLoader
from lightship.data.streaming.prefetch import BatchRange
from lightship.data.train_batches import build_augment, check_batches
from lightship.distributed import comm

logger = logging.getLogger(__name__)
_STATISTICS_IMAGES, _STATISTICS_AT_ONCE = 1024, 128
FIXED_STATISTICS = {
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "none": ([0.0] * 3, [1.0] * 3),
}
"""data.normalize -> mean and deviation of each channel, where they are not of the images."""


class ImageData(LightningDataModule):
    """Images at a URL, as training and evaluation batches on the trainer's device.

    A split is read when it is first used (or by `prepare`), see `ImageSplit`.

    Args:
        config: The data section.
        manifests: Split -> its samples (see splits.py); those without labels are `predict`.
        seed: The run's seed (order, augmentation).
        accumulate: Parts each device's share of a global batch is cut into.

    Attributes:
        predict_batches: [K, B] int64 ids of the split `predict`: this rank's batches; set before a
            prediction.
    """

    supports_fast_loop = True  # a promise: see training/fast_loop.py

    def __init__(
        self,
        config: DataConfig,
        manifests: Mapping[str, Manifest],
        seed: int,
        accumulate: int,
    ) -> None:
        super().__init__()
        self.config, self.manifests = config, manifests
        self.seed, self.accumulate = seed, accumulate
        self.predict_batches: np.ndarray | None = None
        self._splits: dict[str, ImageSplit] = {}
        self._on_device: dict[str, ResidentSplit | StreamedSplit] = {}
        self._features: dict[str, ResidentSplit] = {}
        self._train_loader: _TrainLoader | None = None
        self._order_version: int | None = None

    @property
    def class_names(self) -> list[str]:
        """The classes in label order."""
        return next(iter(self.manifests.values())).class_names

    @property
    def image_size_px(self) -> int:
        """Side of the images, as set or as the first split has them, which must be prepared."""
        return self.config.image_size_px or next(iter(self._splits.values())).size_px

    @property
    def skipped(self) -> list[str]:
        """The images that this rank could not read and skipped, of all splits, and why."""
        return [reason for split in self._splits.values() for reason in split.unreadable.values()]

    def readable(self, split: str) -> int:
        """Images of a split, without those that are known to be bad by now."""
        bad = self._splits[split].unreadable if split in self._splits else ()
        return len(self.manifests[split]) - len(bad)

    def unreadable(self, split: str) -> Mapping[int, str]:
        """`ImageSplit.unreadable` of a prepared split."""
        return self._splits[split].unreadable

    @property
    def _streamed_bad(self) -> dict[str, BadSamples]:
        """Of a streamed split a rank reads its share only; a resident one each rank decodes."""
        return {name: split.bad for name, split in self._splits.items() if split.decoded is None}

    def count_bad_samples(self) -> None:
        """Count the bad samples of all ranks, see `_compare_ranks`. Every rank; blocks."""
        if self.config.on_error == "skip":
            _compare_ranks(self._streamed_bad)
            self._log_bad_samples()

    def _log_bad_samples(self) -> None:
        for name, split in self._splits.items():
            if line := split.bad.take_line():
                logger.info(f"{name}: {line}")

    def state_dict(self) -> dict[str, Any]:
        """What a restart goes on with: the version of the order, and the bad samples so far.

        Every rank; blocks.
        """
        self.count_bad_samples()
        bad = {split: bad.state_dict() for split, bad in self._streamed_bad.items() if bad.reasons}
        return {"order": self._order_version or NEWEST, **bad}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what a checkpoint knows. Every rank, after `prepare`.

        Raises:
            NewerVersion: Its order is that of a newer version.
        """
        self._order_version = state_dict.get("order", FIRST)
        versions.check("order", self._order_version, "the checkpoint")
        for split, bad in self._streamed_bad.items():
            if split in state_dict:
                bad.load_state_dict(state_dict[split])

    def prepare(self, name: str) -> ImageSplit:
        """The split of that name, made at the first call. Every rank; blocks.

        Raises:
            DataError: See `ImageSplit`.
            ConfigError: Likewise.
        """
        if name not in self._splits:
            size_px = self.image_size_px if self._splits else self.config.image_size_px
            self._splits[name] = ImageSplit(self.config, name, self.manifests[name], size_px)
            if self._splits[name].decoded is not None:
                self._log_bad_samples()
        return self._splits[name]

    def pixel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation a channel, in 0..1, as the settings ask for. Every rank; blocks.

        normalize auto: of 1,024 images spread evenly over train, the same however the set is read.
        """
        mean, std = self.config.mean, self.config.std
        if mean is None or std is None:
            statistics = self._statistics()
            mean, std = mean or statistics[0], std or statistics[1]
        return mean, std

    def _statistics(self) -> tuple[list[float], list[float]]:
        if self.config.normalize in FIXED_STATISTICS:
            return FIXED_STATISTICS[self.config.normalize]
        train = self.prepare("train")
        ids = train.spread(_STATISTICS_IMAGES)
        parts = -(-len(ids) // _STATISTICS_AT_ONCE)
        return channel_statistics(train.read(ids[at::parts])[0] for at in range(parts))

    def examples(self, name: str, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`count` images spread evenly over a split: uint8 [K,3,S,S], labels [K], ids [K], CPU.

        Blocks. Fewer if some of them cannot be read.
        """
        split = self.prepare(name)
        images, ids = split.read(split.spread(count))
        batch = torch.from_numpy(images).permute(0, 3, 1, 2)
        return (
            batch,
            torch.from_numpy(split.manifest.label[ids].astype(np.int64)),
            torch.from_numpy(ids),
        )

    def images(self, name: str, ids: np.ndarray) -> dict[int, np.ndarray]:
        """The pixels of some samples by id, [S, S, 3] uint8, without those that cannot be read.

        This rank alone; blocks.
        """
        images, readable = self.prepare(name).read(ids)
        return dict(zip(readable.tolist(), images, strict=True))

    def train_dataloader(self) -> "_TrainLoader":
        """Training batches from wherever the trainer stands."""
        self._train_loader = _TrainLoader(self._make_train_loader())
        return self._train_loader

    def _make_train_loader(self) -> ResidentTrainLoader | StreamedTrainLoader:
        assert self.trainer is not None
        trainer, config = self.trainer, self.config
        share = self._train_share()
        split, augment = self._split_on_device("train"), build_augment(config, self.seed)
        check_batches(config, share, self.image_size_px)
        progress = trainer.fit_loop.epoch_loop.batch_progress.current

        if isinstance(split, ResidentSplit):
            return ResidentTrainLoader(
                split, share, augment, lambda: (trainer.current_epoch, progress.ready)
            )

        def batches_left() -> BatchRange:
            last = trainer.max_epochs
            batches = min(len(share), int(trainer.num_training_batches))
            epochs = last if last is not None and last >= 0 else None
            return BatchRange(trainer.current_epoch, progress.ready, batches, epochs)

        sizes = None
        if config.sizes_px:
            sizes = SizeSchedule(config.sizes_px, self._epochs(share))
        return StreamedTrainLoader(split, share, augment, config.crop_min_area, batches_left, sizes)

    def _epochs(self, share: TrainShare) -> int:
        """Epochs of the fit, by max_epochs or max_steps, whichever ends it first; at least 1.

        `trainer.num_training_batches` is not known until there is a loader.
        """
        trainer = self.trainer
        assert trainer is not None
        assert trainer.max_epochs is not None
        if trainer.max_steps < 0:
            return trainer.max_epochs
        limit = trainer.limit_train_batches
        batches = min(len(share), limit) if isinstance(limit, int) else len(share)
        steps = -(-batches // trainer.accumulate_grad_batches)
        return max(1, min(trainer.max_epochs, -(-trainer.max_steps // steps)))

    def _train_share(self) -> TrainShare:
        assert self.trainer is not None
        trainer, size = self.trainer, self.config.global_batch_size
        if self._order_version is None:  # checkpoints of 0.1.0 have no state of the data
            self._order_version = NEWEST if trainer.ckpt_path is None else FIRST
        order = order_of(self.manifests["train"], size, self.seed, self._order_version)
        if order.dropped_per_epoch:
            logger.info(
                f"train: {order.steps_per_epoch} batches of {size} an epoch; the last, incomplete "
                f"one ({order.dropped_per_epoch} of {order.num_samples} images, different ones "
                "each epoch) is dropped"
            )
        chips = devices.of(trainer.strategy.root_device).chips
        return TrainShare(order, trainer.global_rank, trainer.world_size, self.accumulate, chips)

    def val_dataloader(self) -> ResidentEvalLoader | StreamedEvalLoader | list:
        """Every validation image once; nothing without a val split."""
        return self._eval_loader("val") if "val" in self.manifests else []

    def test_dataloader(self) -> ResidentEvalLoader | StreamedEvalLoader:
        """Every test image once."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> ResidentEvalLoader | StreamedEvalLoader:
        """The batches of `predict_batches`."""
        assert self.predict_batches is not None
        return self._loader("predict", ListedShare(self.predict_batches))

    def listed_dataloader(
        self, split: str, batches: np.ndarray
    ) -> ResidentEvalLoader | StreamedEvalLoader:
        """These batches of a split, without augmentation.

        Args:
            split: Its name.
            batches: [K, B] int64 ids, NOT_COUNTED in padding: this rank's.
        """
        return self._loader(split, ListedShare(batches))

    def use_features(self, split: str, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Until the fit's end, batches have features in place of the images of a split.

        Args:
            split: Its name.
            features: [N, D] float32, on the trainer's device.
            labels: [N] int64 there, NOT_COUNTED where the image could not be read.
        """
        self._features[split] = ResidentSplit(features, labels)
        if split == "train" and self._train_loader is not None:
            self._train_loader.close()
            self._train_loader.loader = self._make_train_loader()

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Nothing to move: the loaders make batches on the device."""
        return batch

    def teardown(self, stage: str) -> None:
        """End what reads ahead."""
        self._features.clear()
        if stage == "fit" and self._train_loader is not None:
            self._train_loader.close()

    def _eval_loader(self, split: str) -> ResidentEvalLoader | StreamedEvalLoader:
        assert self.trainer is not None
        trainer = self.trainer
        size = self.config.eval_batch_size * devices.of(trainer.strategy.root_device).chips
        share = EvalShare(len(self.manifests[split]), size, trainer.global_rank, trainer.world_size)
        return self._loader(split, share)

    def _loader(
        self, name: str, share: EvalShare | ListedShare
    ) -> ResidentEvalLoader | StreamedEvalLoader:
        split = self._split_on_device(name)
        if isinstance(split, ResidentSplit):
            return ResidentEvalLoader(split, share)
        return StreamedEvalLoader(split, share)

    def _split_on_device(self, name: str) -> ResidentSplit | StreamedSplit:
        assert self.trainer is not None
        if name in self._features:
            return self._features[name]
        if name not in self._on_device:
            device = self.trainer.strategy.root_device
            self._on_device[name] = self.prepare(name).on(device)
        return self._on_device[name]


def _compare_ranks(splits: Mapping[str, BadSamples]) -> None:
    """Count the bad samples of all ranks against the bound. Every rank; blocks for the others.

    Args:
        splits: The same splits on every rank.

    Raises:
        DataError: Too many (or all) of a split are bad.
        ConfigError: The same, where access was denied to all of them.
    """
    news = {split: bad.take_news() for split, bad in splits.items()}
    if comm.all_reduce_any(any(each.reasons for each in news.values())):
        everybodys = comm.all_gather(news)
        for split, bad in splits.items():
            bad.merge(each[split] for each in everybodys)


class _TrainLoader:
    """The loader of the training split, which `use_features` replaces before the first batch."""

    def __init__(self, loader: ResidentTrainLoader | StreamedTrainLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        yield from self.loader

    def close(self) -> None:
        """Stop prefetching."""
        if isinstance(self.loader, StreamedTrainLoader):
            self.loader.close()
