"""`lightship fit`: train, evaluate, report."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from lightship import choices, storage
from lightship.checkpoint.record import Commit
from lightship.checkpoint.store import CheckpointStore
from lightship.commands.base import Command
from lightship.commands.choosing import choose
from lightship.config import PREPROCESSING, Config
from lightship.data import decode_ahead
from lightship.data.feature_store import remove_features
from lightship.data.images.resize import DEFAULT_RESIZE
from lightship.data.manifest import refuse_one_class
from lightship.data.module import ImageData
from lightship.data.regime import resize_of
from lightship.data.splits import Scanned, load_splits, scan_splits
from lightship.distributed import comm
from lightship.distributed.signals import Phase, StopRequest
from lightship.errors import ConfigError, LightshipError, in_one_line
from lightship.models.classifier import ImageClassifier
from lightship.models.finetune import check_batch_norm
from lightship.models.hyper_parameters import complete
from lightship.models.losses import balanced_weights, weights_line
from lightship.models.nets.build import check_name, check_training
from lightship.models.nets.recompute import recompute_blocks
from lightship.models.nets.weights import Weights, read_weights
from lightship.models.preprocessing import adopt, of_weights
from lightship.report import ReportData, write_report
from lightship.report.collect import collect_report
from lightship.report.environment import environment_facts
from lightship.run import config_file
from lightship.run.folder import RunFolder, Start
from lightship.run.restarts import record_start
from lightship.tracking.metrics_csv import MetricsCSV
from lightship.tracking.start import (
    Preparation,
    is_run_id,
    prepare_tracking,
    run_id,
    start_tracking,
)
from lightship.tracking.tracker import Tracker
from lightship.training.callbacks.build import build_callbacks
from lightship.training.callbacks.early_stopping import check_monitor
from lightship.training.callbacks.progress import Progress
from lightship.training.trainer import (
    build_data,
    build_trainer,
    evaluate,
    numbers_line,
    start_progress,
)

logger = logging.getLogger(__name__)
_IMAGES_TO_START_FROM = 5000


def fit(command: Command) -> None:
    """Train, evaluate the best checkpoint and write the report. Every rank; blocks.

    Resumes from the newest checkpoint under run.output, if there is one.
    """
    config, folder = command.config, RunFolder(command.config)
    store = folder.checkpoints
    with StopRequest() as stop, ExitStack() as at_exit:
        at_exit.callback(decode_ahead.forget)
        progress = start_progress(config)
        _refuse_unknown(config)
        scanned = _choose_settings(command, folder)
        weights = _adopt_preprocessing(folder)
        if completed := comm.broadcast_from_rank_0(folder.completed):
            logger.info(completed)
            return
        start = comm.broadcast_from_rank_0(partial(folder.open, command.ckpt_path))
        _refuse_unshared(folder)
        preparation = comm.on_rank_0(partial(_prepare_tracking, folder, at_exit))
        data = _load_data(config, folder.at("data"), scanned, resumes=start.url is not None)
        mean_std = _pixel_statistics(data, start, store)
        model = _build_model(config, data, weights, mean_std, is_new=start.url is None)

        environment = environment_facts() if comm.is_rank_0() else {}
        tracker = comm.on_rank_0(
            partial(_start_tracking, folder, environment, preparation, at_exit)
        )
        starts = comm.on_rank_0(partial(record_start, folder.url, start.step, comm.world_size()))
        metrics = MetricsCSV(folder.url, store.check_fence)
        callbacks = build_callbacks(
            config, data, store, metrics, tracker, stop, progress, folder.at("features")
        )
        trainer = build_trainer(config, callbacks, [metrics, tracker], store)
        logger.info(_summary(config, data, model, start, environment, trainer.precision))
        if config.optim.name != "muon-sgd":  # with its three rates
            logger.info(model.rates_line)
        with _resuming(start, stop):
            if start.url is not None:  # the trainer's ranks wait no longer than timeout_s for it
                comm.on_every_rank(partial(store.peek, start.url))
            trainer.fit(model, datamodule=data, ckpt_path=start.url)
        comm.on_rank_0(store.wait)  # however long it takes
        stop.end_training()

        best = _best(store)
        split, results = _evaluate(config, data, model, best, store, progress)
        report = collect_report(
            model, data, split, config.run.log_images,
            title=folder.name, config=config_file.shown(config), rows=metrics.rows,
            final={**_numbers(trainer.global_step, best, metrics), **results},
            environment=environment, starts=starts,
        )  # fmt: skip
        # No rank may end with 0 before the run is complete: it would not be started again.
        comm.on_rank_0(partial(_finish, folder, report, best, split, tracker, progress))


def _refuse_unknown(config: Config) -> None:
    """Raise ConfigError for a net, accelerator or precision that does not exist.

    Before anything is read, downloaded or written, which may take an hour.
    """
    check_name(config.model.net)
    build_trainer(config, [])


@contextmanager
def _resuming(start: Start, stop: StopRequest) -> Iterator[None]:
    """Turn an error of restoring a checkpoint, before the first step, into one that names it.

    Errors of processes and storage (RuntimeError, OSError) keep their meaning.

    Raises:
        ConfigError: The checkpoint's content is not as it was saved.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if start.url is None or stop.phase != Phase.SETUP or isinstance(error, LightshipError):
            raise
        raise ConfigError(
            f"--run.output cannot be resumed from {storage.redact(start.url)}: {in_one_line(error)}"
        ) from error


def _refuse_unshared(folder: RunFolder) -> None:
    """Raise ConfigError if a local output is not one folder for all nodes. Every rank; blocks."""
    if comm.is_one_node() or storage.is_remote(folder.url):
        return
    attempt = comm.broadcast_from_rank_0(lambda: folder.checkpoints.attempt)

    def check() -> None:
        if not folder.sees(attempt):
            raise ConfigError(
                f"--run.output {folder.url} is a local folder, and node "
                f"{os.environ['GROUP_RANK']} does not see what node 0 wrote there: give a URL, or "
                "a volume that all nodes mount"
            )

    comm.on_every_rank(check)


def _choose_settings(command: Command, folder: RunFolder) -> Scanned | None:
    """Complete the settings by the training images and the net, or by the run's first start.

    Every rank; blocks while data.root is listed: a restart need not.

    Returns:
        What was listed; None: nothing was.
    """
    names = command.choices.names
    kept = comm.broadcast_from_rank_0(partial(folder.earlier_choices, names))
    choices.assign_earlier(command.config, kept, folder.url)
    if not names:
        return None
    if names[0] in kept:
        flags = choices.as_flags({name: kept[name] for name in names})
        logger.info(f"chosen by the run's first start: {flags}")
        return None
    scanned = scan_splits(command.config.data, "train") if command.choices.by_train_images else None
    if line := choose(command, scanned.sizes["train"] if scanned else None):
        logger.info(line)
    return scanned


def _adopt_preprocessing(folder: RunFolder) -> Callable[[], Weights] | None:
    """Complete the settings by the weights' own preprocessing, or by that of the run's first start.

    Every rank; blocks while weights are read: a restart does not need them.

    Returns:
        Reads the weights, once; None: there are none.
    """
    config = folder.config
    if config.model.weights is None:
        return None
    net, url = config.model.net, config.model.weights
    read = functools.cache(lambda: comm.local_rank_0_first(lambda: read_weights(net, url)))
    kept = comm.broadcast_from_rank_0(folder.settings_of_same_weights)
    own = of_weights(net, read()) if kept is None else {name: kept[name] for name in PREPROCESSING}
    own = {name: value for name, value in own.items() if value is not None}
    if differs := adopt(config.data, own):
        logger.info(differs)
    return read


def _load_data(config: Config, cache_url: str, scanned: Scanned | None, resumes: bool) -> ImageData:
    """The images at data.root, those for training and validation read or ready to be read."""
    manifests = load_splits(config.data, cache_url, "train", scanned, use_saved=resumes)
    refuse_one_class(manifests["train"], config.data.root)
    check_monitor(config.trainer, manifests, len(manifests["train"].class_names))
    data = build_data(config, manifests)
    for split in ("train", "val"):
        if split in manifests:
            data.prepare(split)
    return data


def _pixel_statistics(
    data: ImageData, start: Start, store: CheckpointStore
) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel, those of a resumed model as it was trained.

    Every rank; blocks. The images may no longer give the same: some may be lost or damaged since.
    """
    asked = data.config
    if start.url is None or asked.normalize != "auto" or (asked.mean and asked.std):
        return data.pixel_statistics()
    mean, std = comm.broadcast_from_rank_0(partial(_kept_statistics, store, start.url))
    return asked.mean or mean, asked.std or std


def _kept_statistics(store: CheckpointStore, url: str) -> tuple[list[float], list[float]]:
    kept = complete(ImageClassifier, store.peek(url).get("hyper_parameters"))
    return kept["mean"], kept["std"]


def _build_model(
    config: Config,
    data: ImageData,
    weights: Callable[[], Weights] | None,
    mean_std: tuple[list[float], list[float]],
    is_new: bool,
) -> ImageClassifier:
    """The model of the settings; a new one starts from weights or images, if there are any."""
    torch.manual_seed(config.run.seed)
    resize = resize_of(config.data) or DEFAULT_RESIZE
    model = ImageClassifier(
        net=config.model.net,
        class_names=data.class_names,
        image_size_px=data.image_size_px,
        mean=mean_std[0],
        std=mean_std[1],
        interpolation=resize.interpolation,
        eval_crop=resize.crop,
        label_smoothing=config.model.label_smoothing,
        channels_last=config.model.channels_last,
        test_flip=config.model.test_flip,
        test_shift=config.model.test_shift,
        optim=dataclasses.asdict(config.optim),
        freeze=config.model.freeze,
        unfreeze_epoch=config.model.unfreeze_epoch,
        batch_norm=config.model.batch_norm,
        dropout=config.model.dropout,
        drop_path=config.model.drop_path,
        loss=config.model.loss,
        focal_gamma=config.model.focal_gamma,
        class_weights=_class_weights(config, data),
    )
    # What does not divide is refused where the order of the images is made.
    batch_size = config.data.global_batch_size // config.trainer.accumulate_grad_batches
    if not config.trainer.sync_batchnorm:
        batch_size = max(1, batch_size // comm.world_size())
    sizes = [("--data.sizes_px", size_px) for size_px in config.data.sizes_px or ()]
    for flag, size_px in [("--data.image_size_px", data.image_size_px), *sizes]:
        freeze = model.freeze_for_good
        check_training(model.net, config.model.net, batch_size, size_px, freeze, flag)
    check_batch_norm(model.net, config.model.net, config.model.batch_norm)
    if config.model.grad_checkpointing:
        recompute_blocks(model.net, f"--model.net {config.model.net}")
    if config.model.compile != "none":
        model.compile_net(config.model.compile)
    if is_new and weights is not None:
        model.load_weights(weights())
    elif is_new and model.wants_images:
        model.init_from_images(data.examples("train", _IMAGES_TO_START_FROM)[0])
    return model


def _class_weights(config: Config, data: ImageData) -> list[float] | None:
    """Those of the settings, by the training split; the same on every rank."""
    if config.model.class_weights == "none":
        return None
    weights = balanced_weights(data.manifests["train"].label, len(data.class_names))
    logger.info(weights_line(weights, data.class_names))
    return weights


def _prepare_tracking(folder: RunFolder, at_exit: ExitStack) -> Preparation | None:
    """Begin what tracking needs, while images are read. Rank 0; does not wait for it."""
    preparation = prepare_tracking(folder.config.run.tracking, folder.scratch_path())
    if preparation:
        at_exit.callback(preparation.close)
    return preparation


def _start_tracking(
    folder: RunFolder,
    environment: dict[str, Any],
    preparation: Preparation | None,
    at_exit: ExitStack,
) -> Tracker | None:
    """Start or resume the run's tracking, to be finished by `at_exit`. Rank 0; blocks."""
    config = folder.config
    tracking_id = run_id(folder.tracking_id(is_run_id))
    folder.keep_tracking_id(tracking_id)
    tracker = start_tracking(
        preparation,
        project=config.run.project,
        run_id=tracking_id,
        name=folder.name,
        config={**config_file.shown(config), "environment": environment},
        mirror_url=folder.at("logs", "wandb") if storage.is_remote(folder.url) else None,
    )
    return at_exit.enter_context(tracker) if tracker else None


def _best(store: CheckpointStore) -> Commit:
    """The record of the best checkpoint. Every rank; blocks."""
    comm.broadcast_from_rank_0(store.check_fence)
    best = comm.broadcast_from_rank_0(store.best)
    assert best is not None, "a finished fit has a checkpoint"
    return best


def _evaluate(
    config: Config,
    data: ImageData,
    model: ImageClassifier,
    best: Commit,
    store: CheckpointStore,
    progress: Progress,
) -> tuple[str | None, dict[str, float]]:
    """Metrics of the best weights on the test split, else on validation. Every rank; blocks."""
    split = next((name for name in ("test", "val") if name in data.manifests), None)
    if split is None:
        return None, {}
    checkpoint = comm.on_every_rank(partial(store.load_checkpoint, store.url_of(best)))
    model.load_state_dict(checkpoint["state_dict"])
    return split, evaluate(config, data, model, split, progress)


def _numbers(steps: int, best: Commit, metrics: MetricsCSV) -> dict[str, float]:
    """Steps of the run and of the best checkpoint, and the latter's validation metrics."""
    validated = metrics.validation(best.step)
    return {"steps": float(steps), "best_step": float(best.step), **validated}


def _finish(
    folder: RunFolder,
    report: ReportData | None,
    best: Commit,
    split: str | None,
    tracker: Tracker | None,
    progress: Progress,
) -> None:
    """Write the report, log the results and mark the run as complete. Rank 0; blocks."""
    assert report is not None, "rank 0 has it"
    store, numbers = folder.checkpoints, report.final
    store.check_fence()
    write_report(folder.url, report)
    if tracker:
        final = {name: value for name, value in numbers.items() if not name.startswith("val/")}
        tracker.log_metrics(final, int(numbers["steps"]))
        if report.confusion is not None:
            tracker.log_confusion(report.confusion, report.class_names, f"{split}/confusion")
        tracker.finish(0)
    store.check_fence()
    remove_features(folder.at("features"))  # before: a complete run is not started again
    folder.mark_done(numbers)
    chosen = f"best {best.metric.monitor}" if best.metric else "newest"
    of = f" (checkpoint of step {best.step}, {chosen})" if split else ""
    progress.display.done(f"done: {numbers_line(numbers, split)}{of}", numbers)
    places = {
        "report": folder.at("report", "report.html"),
        "best checkpoint": store.url_of(best),
        **({"W&B": tracker.place} if tracker and tracker.place else {}),
    }
    shown = ", ".join(f"{name} {storage.redact(place)}" for name, place in places.items())
    logger.info(f"outputs in {storage.redact(folder.url)}: {shown}")


def _summary(
    config: Config,
    data: ImageData,
    model: ImageClassifier,
    start: Start,
    environment: dict[str, Any],
    precision: str,
) -> str:
    """What is trained, on what and where, in a line."""
    sizes = ", ".join(f"{data.readable(split)} {split}" for split in data.manifests)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    resumed = "" if start.url is None else f", from step {start.step}"
    on = environment.get("device", "")
    if comm.world_size() > 1:
        on = f"{comm.world_size()} processes, {on}"
    if config.trainer.precision == "auto":
        on += f", {precision}"
    return (
        f"training {config.model.net} ({parameters / 1e6:.2f} M parameters) on "
        f"{storage.redact(config.data.root)}: {sizes} images of {data.image_size_px} px in "
        f"{len(data.class_names)} classes, to {storage.redact(str(config.run.output))}{resumed}; "
        f"{on}"
    )
