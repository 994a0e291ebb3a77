"""What the data section sets for training batches: their augmentation, and the sizes it needs."""

from lightship.config import DataConfig
from lightship.data.augment import Augment
from lightship.data.shares import TrainShare
from lightship.errors import ConfigError


def build_augment(config: DataConfig, seed: int) -> Augment:
    """The augmentation that the data section sets."""
    return Augment(
        seed,
        crop_padding_px=config.crop_padding_px,
        flip=config.flip,
        flip_in_turn=config.flip_in_turn,
        cutout_px=config.cutout_px,
        mixup_alpha=config.mixup_alpha,
        cutmix_alpha=config.cutmix_alpha,
    )


def check_batches(config: DataConfig, share: TrainShare, image_size_px: int | None) -> None:
    """Check that the augmentation suits the size of batches and images.

    Args:
        config: The data section.
        share: The rank's batches.
        image_size_px: Side of the images, without `sizes_px` also in training; None: not known.

    Raises:
        ConfigError: It does not.
    """
    per_device = share.batch_size // share.chips
    if (config.mixup_alpha or config.cutmix_alpha) and per_device % 2:
        raise ConfigError(
            f"mixup and CutMix mix pairs of images: the batch per device is {per_device} "
            "(--data.global_batch_size / devices / --trainer.accumulate_grad_batches); it must be "
            "even"
        )
    smallest_px = min(config.sizes_px) if config.sizes_px else image_size_px
    if smallest_px and config.crop_padding_px >= smallest_px:
        where = " (the smallest of --data.sizes_px)" if config.sizes_px else ""
        raise ConfigError(
            f"--data.crop_padding_px is {config.crop_padding_px}; it must be less than the "
            f"image's {smallest_px} px{where}"
        )
