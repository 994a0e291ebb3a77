"""Lightning's Trainer, the data module and progress, as the settings configure them."""

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightship.config import Config
from lightship.data.manifest import Manifest
from lightship.data.module import ImageData
from lightship.devices import fastest_precision
from lightship.devices.allocator import keep_freed_memory
from lightship.distributed import comm
from lightship.errors import ConfigError
from lightship.models.classifier import ImageClassifier
from lightship.models.metrics import LOGGED
from lightship.training.callbacks.heartbeat import build_heartbeat
from lightship.training.callbacks.progress import Progress, build_progress
from lightship.training.fast_loop import ignore_signals, use_fast_loop
from lightship.training.sync_batch_norm import SyncBatchNorm
from lightship.training.xla import xla_arguments

logger = logging.getLogger(__name__)


def start_progress(config: Config) -> Progress:
    """The progress callback; silences Lightning's own log lines and warnings."""
    asked = config.trainer.precision
    used = fastest_precision(asked, config.trainer.accelerator)
    if asked not in ("auto", used):
        logger.warning(f"--trainer.precision {asked}: Lightning uses {used} on a CPU")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_float32_matmul_precision("high")
    return build_progress(config.run.log_format, config.trainer.monitor)


def build_data(config: Config, manifests: Mapping[str, Manifest]) -> ImageData:
    """The images of these splits, not read yet (see `ImageData`)."""
    parts = config.trainer.accumulate_grad_batches
    return ImageData(config.data, manifests, config.run.seed, parts)


def build_trainer(
    config: Config,
    callbacks: list[Callback],
    loggers: Sequence[Logger | None] = (),
    checkpoint_io: CheckpointIO | None = None,
) -> Trainer:
    """Lightning's Trainer with the settings, and lightship's parts in place of its defaults.

    Raises:
        ConfigError: Lightning does not support accelerator, devices or precision, or torch
            synchronized BatchNorm on the device.
    """
    asked = config.trainer
    parts = asked.accumulate_grad_batches
    placement = _placement(config, checkpoint_io)
    try:
        trainer = Trainer(
            **placement,
            max_epochs=asked.max_epochs,
            max_steps=asked.max_steps,
            accumulate_grad_batches=parts,
            gradient_clip_val=asked.gradient_clip_val or None,
            log_every_n_steps=asked.log_every_n_steps,
            check_val_every_n_epoch=asked.check_val_every_n_epoch,
            # Lightning counts micro-batches, the user global batches.
            limit_train_batches=parts * (asked.limit_train_batches or 0) or 1.0,
            limit_val_batches=asked.limit_val_batches or 1.0,
            limit_test_batches=asked.limit_test_batches or 1.0,
            deterministic=asked.deterministic,
            callbacks=[*build_heartbeat(), *callbacks],
            logger=[each for each in loggers if each is not None],
            enable_checkpointing=checkpoint_io is not None,
            use_distributed_sampler=False,  # order.py is the sampler
            enable_progress_bar=False,  # lightship has its own
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
    except (MisconfigurationException, ValueError) as error:
        flags = ", ".join(
            f"--trainer.{name} {getattr(asked, name)}"
            for name in ("accelerator", "devices", "precision")
        )
        reason = str(error).splitlines()[0]
        raise ConfigError(f"Lightning does not support {flags}: {reason}") from None
    if trainer.strategy.root_device.type == "cpu":
        if any(isinstance(each, SyncBatchNorm) for each in placement["plugins"]):
            raise ConfigError(
                "--trainer.sync_batchnorm true needs GPUs: torch has none for CPUs; set it to false"
            )
        keep_freed_memory()
    return use_fast_loop(ignore_signals(trainer))


def _placement(config: Config, checkpoint_io: CheckpointIO | None) -> dict[str, Any]:
    """The Trainer's devices, nodes, strategy and plugins for this process of the job."""
    asked = config.trainer
    plugins: list[Any] = [checkpoint_io] if checkpoint_io else []
    if asked.is_on_tpu:
        if config.model.compile != "none":
            raise ConfigError(
                f"--model.compile {config.model.compile}: XLA compiles every step; set none"
            )
        placed = xla_arguments(asked.devices, fastest_precision(asked.precision, "tpu"))
        return {**placed, "plugins": [*placed["plugins"], *plugins]}
    common = {
        "accelerator": asked.accelerator,
        "precision": fastest_precision(asked.precision, asked.accelerator),
        "plugins": plugins,
    }
    if not comm.is_initialized():
        # Otherwise Lightning reads SLURM's variables and checks them against devices.
        common["plugins"] = [*plugins, LightningEnvironment()]
        return {**common, "devices": 1 if asked.devices == "auto" else int(asked.devices)}
    if asked.sync_batchnorm and checkpoint_io is not None:  # only a fit has one
        plugins.append(SyncBatchNorm())
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    strategy = _DDP(
        cluster_environment=TorchElasticEnvironment(),
        find_unused_parameters=False,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # SyncBuffers does it, outside the step
    )
    nodes = int(os.environ["WORLD_SIZE"]) // here
    return {**common, "devices": here, "num_nodes": nodes, "strategy": strategy}


class _DDP(DDPStrategy):
    """Lightning's, without the pickles that it sends between ranks."""

    supports_fast_loop = True

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Rank 0's plain value on every rank. Every rank; blocks."""
        assert src == 0, src
        return comm.broadcast_from_rank_0(lambda: obj)


def evaluate(
    config: Config, data: ImageData, model: ImageClassifier, split: str, progress: Progress
) -> dict[str, float]:
    """Metrics of `model` over every sample of a split ("val" or "test"). Every rank; blocks.

    The trainer has none of the training callbacks; the model holds averaged weights already (EMA).
    """
    trainer = build_trainer(config, [progress])
    run = trainer.test if split == "test" else trainer.validate
    run(model, datamodule=data, verbose=False)
    data.count_bad_samples()
    measured = model.eval_metrics
    names = [name for name in (*LOGGED, "num_samples") if name in measured]
    return {f"{split}/{name}": float(measured[name]) for name in names}


def numbers_line(numbers: Mapping[str, float], split: str | None) -> str:
    """The metrics of a split as one line of text."""
    shown = [
        f"{key} {value:.0f}" if value.is_integer() and value > 1 else f"{key} {value:.4f}"
        for key, value in numbers.items()
        if key.startswith(f"{split}/")
    ]
    return ", ".join(shown) or "no evaluation split"
