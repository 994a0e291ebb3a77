"""The callbacks of a fit, in the order in which Lightning calls them."""

from lightning.pytorch import Callback

from lightship.checkpoint.policy import CheckpointPolicy
from lightship.checkpoint.store import CheckpointStore
from lightship.config import Config
from lightship.data.module import ImageData
from lightship.distributed.signals import StopRequest
from lightship.tracking.metrics_csv import MetricsCSV
from lightship.tracking.tracker import Tracker
from lightship.training.callbacks.batch_norm import PreciseBatchNorm
from lightship.training.callbacks.checkpointing import Checkpointing
from lightship.training.callbacks.divergence import Divergence
from lightship.training.callbacks.early_stopping import EarlyStopping
from lightship.training.callbacks.ema import EMA
from lightship.training.callbacks.freezing import Freezing
from lightship.training.callbacks.frozen_backbone import FrozenBackbone, uses_features
from lightship.training.callbacks.head_init import HeadInit
from lightship.training.callbacks.image_predictions import ImagePredictionLogger
from lightship.training.callbacks.progress import Progress
from lightship.training.callbacks.schedule_change import ScheduleChange
from lightship.training.callbacks.seeding import StepSeeding
from lightship.training.callbacks.sync_buffers import SyncBuffers
from lightship.training.callbacks.throughput import Throughput


def build_callbacks(
    config: Config,
    data: ImageData,
    store: CheckpointStore,
    metrics: MetricsCSV,
    tracker: Tracker | None,
    stop: StopRequest,
    progress: Progress,
    features_url: str,
) -> list[Callback]:
    """Build the callbacks of a fit. Every rank; rank 0 reads the images that it logs.

    Args:
        config: The run's settings.
        data: With its training and validation splits prepared.
        store: Where checkpoints go.
        metrics: The run's metrics.
        tracker: Rank 0's, if the run is tracked.
        stop: Set when this process is asked to stop.
        progress: The run's display.
        features_url: Folder of features (see `HeadInit`).
    """
    run, trainer, has_validation = config.run, config.trainer, "val" in data.manifests
    patience = trainer.early_stopping_patience
    early_stopping = EarlyStopping.of(trainer) if patience else None
    divergence = Divergence(trainer.on_nonfinite, metrics, early_stopping)
    callbacks: list[Callback] = [StepSeeding(run.seed)]
    if config.model.head_init == "features":
        callbacks.append(HeadInit(features_url, progress.display))
    if uses_features(config):
        callbacks.append(FrozenBackbone(config.data, features_url, progress.display))
    ema = EMA(config.model.ema_decay) if config.model.ema_decay else None
    if ema is not None:
        callbacks.append(ema)
    callbacks += [SyncBuffers(), ScheduleChange(), Freezing()]
    if config.model.batch_norm == "precise":
        callbacks.append(PreciseBatchNorm(ema))
    if early_stopping is not None:
        callbacks.append(early_stopping)
    if tracker is not None and run.log_images and has_validation:
        examples = data.examples("val", run.log_images)
        callbacks.append(ImagePredictionLogger(*examples, data.class_names, tracker))
    return [
        *callbacks,
        progress,
        divergence,
        Throughput(config.data.global_batch_size, trainer.log_every_n_steps, divergence),
        Checkpointing(
            store,
            facts={"class_names": data.class_names},
            stop=stop,
            table=metrics,
            monitor=trainer.monitor if has_validation else None,
            bound=CheckpointPolicy(run.checkpoint_every_steps, run.checkpoint_every_s),
        ),
    ]
