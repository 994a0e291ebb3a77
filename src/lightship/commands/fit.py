"""One run in reading order: output, data, model, callbacks, trainer, fit, test, report."""

import dataclasses
import logging
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback

from lightship import storage
from lightship.checkpoint.policy import CheckpointPolicy
from lightship.commands.base import Command
from lightship.config import Config
from lightship.data.manifest import refuse_one_class
from lightship.data.module import ImageData
from lightship.data.splits import load_splits
from lightship.distributed import comm
from lightship.distributed.signals import StopRequest
from lightship.errors import ConfigError
from lightship.models.classifier import ImageClassifier
from lightship.models.nets.build import check_training
from lightship.report import ReportData, Shown, write_report
from lightship.report.environment import environment_facts
from lightship.report.error_analysis import find_mistakes
from lightship.run import config_file
from lightship.run.folder import RunFolder
from lightship.run.restarts import record_start
from lightship.tracking.metrics_csv import MetricsCSV
from lightship.tracking.start import run_id, start_tracking
from lightship.tracking.tracker import Tracker
from lightship.training.callbacks.checkpointing import Checkpointing
from lightship.training.callbacks.divergence import Divergence
from lightship.training.callbacks.early_stopping import EarlyStopping
from lightship.training.callbacks.ema import EMA
from lightship.training.callbacks.image_predictions import ImagePredictionLogger
from lightship.training.callbacks.schedule_change import ScheduleChange
from lightship.training.callbacks.seeding import StepSeeding
from lightship.training.callbacks.sync_buffers import SyncBuffers
from lightship.training.callbacks.throughput import Throughput
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
    """Train, test the best checkpoint, report. Goes on from the newest good checkpoint."""
    with StopRequest() as stop, ExitStack() as at_end:
        _fit(command, stop, at_end)


def _fit(command: Command, stop: StopRequest, at_end: ExitStack) -> None:
    config = command.config
    progress = start_progress(config)
    output = RunFolder(config)
    store = output.checkpoints
    if completed := comm.broadcast_from_rank_0(output.completed):
        logger.info(completed)
        return
    start = comm.broadcast_from_rank_0(partial(output.open, command.ckpt_path))
    manifests = load_splits(config.data, output.at("data"), need="train")
    refuse_one_class(manifests["train"], config.data.root)
    data = build_data(config, manifests)
    early_stopping = _early_stopping(config, data)
    for part in ("train", "val"):
        if part in data.manifests:
            data.prepare(part)

    torch.manual_seed(config.run.seed)
    model = _build_model(config, data)
    if start is None and config.model.weights is None and model.wants_images:
        model.init_from_images(data.examples("train", _IMAGES_TO_START_FROM)[0])

    environment = environment_facts() if comm.is_rank_0() else {}
    tracker: Tracker | None = None

    def track() -> None:
        nonlocal tracker
        tracking_id = run_id(output.tracking_id())
        output.keep_tracking_id(tracking_id)
        logs_url = output.at("logs", "wandb") if storage.is_remote(output.url) else None
        tracker = start_tracking(
            config.run.tracking,
            project=config.run.project,
            run_id=tracking_id,
            name=storage.base_name(output.url),
            config={**config_file.shown(config), "environment": environment},
            scratch_path=output.scratch_path(),
            mirror_url=logs_url,
        )
        if tracker:
            at_end.enter_context(tracker)

    comm.broadcast_from_rank_0(track)
    step = start.step if start else 0
    starts = comm.broadcast_from_rank_0(partial(record_start, output.url, step, comm.world_size()))
    table = MetricsCSV(output.url, store.check_fence)
    divergence = Divergence(config.trainer.on_nonfinite, table)

    callbacks = [
        StepSeeding(config.run.seed),
        *([EMA(config.model.ema_decay)] if config.model.ema_decay else []),
        SyncBuffers(),
        ScheduleChange(),
        *early_stopping,
        *_prediction_logger(config, data, tracker),
        progress,
        divergence,
        Throughput(config.data.global_batch_size, config.trainer.log_every_n_steps, divergence),
        Checkpointing(
            store,
            facts={"class_names": data.class_names},
            stop=stop,
            table=table,
            monitor=config.trainer.monitor if "val" in data.manifests else None,
            bound=CheckpointPolicy(
                config.run.checkpoint_every_steps, config.run.checkpoint_every_s
            ),
        ),
    ]
    trainer = build_trainer(config, callbacks, [table, *([tracker] if tracker else [])], store)
    logger.info(_first_line(config, data, model, environment, start.step if start else None))
    trainer.fit(model, datamodule=data, ckpt_path=start.url if start else None)
    store.wait()
    stop.end_training()

    comm.broadcast_from_rank_0(store.check_fence)
    best = comm.broadcast_from_rank_0(store.best)
    assert best is not None, "a finished fit has a checkpoint"
    numbers = {"steps": float(trainer.global_step), "best_step": float(best.step)}
    validated = next((row for row in table.rows if row["step"] == best.step), {})
    numbers |= {name: value for name, value in validated.items() if name.startswith("val/")}
    split = next((name for name in ("test", "val") if name in data.manifests), None)
    if split:
        model.load_state_dict(store.load_checkpoint(store.url_of(best))["state_dict"])
        numbers |= evaluate(config, data, model, split, progress)
    found = find_mistakes(model, data, split) if split else {}
    skipped = comm.gather_to_rank_0(data.skipped)
    if not comm.is_rank_0():
        return
    report = ReportData(
        title=storage.base_name(output.url),
        config=config_file.shown(config),
        rows=table.rows,
        final=numbers,
        class_names=model.class_names,
        predictions=_examples(config, data, model, split) if split else [],
        environment=environment,
        skipped=sorted({line for each in skipped for line in each}),
        starts=starts,
        **found,
    )
    store.check_fence()
    write_report(output.url, report)
    if tracker:
        final = {name: value for name, value in numbers.items() if not name.startswith("val/")}
        tracker.log_metrics(final, trainer.global_step)
        if report.confusion is not None:
            tracker.log_confusion(report.confusion, data.class_names, f"{split}/confusion")
        tracker.finish(0)
    store.check_fence()
    output.mark_done(numbers)
    how = f"the best by {best.metric.monitor}" if best.metric else "the newest"
    of = f", by the checkpoint of step {best.step}, {how}" if split else ""
    progress.done(f"done: {numbers_line(numbers, split)}{of}", numbers)
    logger.info(_last_line(output, best.file, tracker))


def _build_model(config: Config, data: ImageData) -> ImageClassifier:
    mean, std = data.pixel_statistics()
    model = ImageClassifier(
        net=config.model.net,
        class_names=data.class_names,
        image_size_px=data.image_size_px,
        mean=mean,
        std=std,
        weights=config.model.weights,
        label_smoothing=config.model.label_smoothing,
        channels_last=config.model.channels_last,
        test_flip=config.model.test_flip,
        test_shift=config.model.test_shift,
        optim=dataclasses.asdict(config.optim),
    )
    # What does not divide is refused where the order of the images is made.
    batch_size = config.data.global_batch_size // config.trainer.accumulate_grad_batches
    if not config.trainer.sync_batchnorm:
        batch_size = max(1, batch_size // comm.world_size())
    check_training(model.net, config.model.net, batch_size, data.image_size_px)
    if config.model.compile != "none":
        model.compile_net(config.model.compile)
    return model


def _early_stopping(config: Config, data: ImageData) -> list[Callback]:
    trainer = config.trainer
    if not trainer.early_stopping_patience:
        return []
    if "val" not in data.manifests:
        raise ConfigError(
            "--trainer.early_stopping_patience needs a validation split, and --data.root "
            f"{storage.redact(config.data.root)} has none: set --data.val_fraction, or 0 patience"
        )
    mode = "min" if trainer.monitor.endswith("loss") else "max"
    return [
        EarlyStopping(
            trainer.monitor,
            patience=trainer.early_stopping_patience,
            mode=mode,
            check_on_train_epoch_end=False,  # an epoch that max_steps cuts short has no validation
        )
    ]


def _prediction_logger(
    config: Config, data: ImageData, tracker: Tracker | None
) -> list[ImagePredictionLogger]:
    if tracker is None or not config.run.log_images or "val" not in data.manifests:
        return []
    examples = data.examples("val", config.run.log_images)
    return [ImagePredictionLogger(*examples, data.class_names, tracker)]


def _examples(config: Config, data: ImageData, model: ImageClassifier, split: str) -> list[Shown]:
    """What the best checkpoint makes of a few fixed images of the evaluated split."""
    if not config.run.log_images:
        return []
    images, labels, ids = data.examples(split, config.run.log_images)
    shares = model.probabilities(images)
    names, manifest = model.class_names, data.manifests[split]
    return [
        Shown(
            image.permute(1, 2, 0).numpy(),
            names[int(label)],
            names[int(share.argmax())],
            float(share.max()),
            path=manifest.name(int(id)),
        )
        for image, label, id, share in zip(images, labels, ids, shares, strict=True)
    ]


def _first_line(
    config: Config,
    data: ImageData,
    model: ImageClassifier,
    environment: dict[str, Any],
    step: int | None,
) -> str:
    sizes = ", ".join(f"{data.readable(split)} {split}" for split in data.manifests)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    start = f", from step {step}" if step is not None else ""
    on = environment.get("device", "")
    if comm.world_size() > 1:
        on = f"{comm.world_size()} processes, {on}"
    return (
        f"training {config.model.net} ({parameters / 1e6:.2f} M parameters) on "
        f"{storage.redact(config.data.root)}: {sizes} images of {data.image_size_px} px in "
        f"{len(data.class_names)} classes, to {storage.redact(str(config.run.output))}{start}; {on}"
    )


def _last_line(output: RunFolder, best_file: str, tracker: Tracker | None) -> str:
    report, best = output.at("report", "report.html"), output.at("checkpoints", best_file)
    places = [f"report {storage.redact(report)}", f"best checkpoint {storage.redact(best)}"]
    if tracker:
        places.append(f"W&B {tracker.place}")
    return f"outputs in {storage.redact(output.url)}: {', '.join(places)}"
