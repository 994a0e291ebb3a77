"""Whether the configuration is one that a fit would take, on these processes."""

import dataclasses

from lightship.config import Config
from lightship.data.order import Order, TrainShare
from lightship.doctor.check import Finding
from lightship.errors import ConfigError

_ENDS = "a fit ends at once with code 78"


def valid(
    config: Config, wrong: str, ranks: int, size_px: int | None, try_trainer: bool
) -> Finding:
    """Everything that a fit refuses later than its command line.

    Args:
        config: Of the fit.
        wrong: What `config.check` said, or ''.
        ranks: Processes of the whole job.
        size_px: Side of the images, where it is known.
        try_trainer: Whether to have Lightning say what it thinks of accelerator and precision.
    """
    try:
        if wrong:
            raise ConfigError(wrong)
        _check_batch(config, ranks, size_px)
        if try_trainer:
            from lightship.training.trainer import build_trainer

            one = dataclasses.replace(config.trainer, devices="1")
            build_trainer(dataclasses.replace(config, trainer=one), [])
    except ConfigError as error:
        return Finding(
            "fail", str(error), _ENDS, "change the flag or the line of the YAML it names"
        )
    data = config.data
    told = f"batches of {data.global_batch_size} on {ranks} process{'es' * (ranks > 1)}"
    return Finding("ok", f"{config.model.net}, {told}", "a fit takes it")


def _check_batch(config: Config, ranks: int, size_px: int | None) -> None:
    data, size = config.data, config.data.global_batch_size
    parts = config.trainer.accumulate_grad_batches
    share = TrainShare(Order(size, size, config.run.seed), 0, ranks, parts)
    if (data.mixup_alpha or data.cutmix_alpha) and share.batch_size % 2:
        raise ConfigError(
            f"mixup and cutmix mix pairs: the device's batch is {share.batch_size} "
            "(--data.global_batch_size / devices / parts); it must be even"
        )
    if size_px and data.crop_padding_px >= size_px:
        raise ConfigError(
            f"--data.crop_padding_px is {data.crop_padding_px}; it must be less than the image's "
            f"{size_px} px"
        )
