"""One run in reading order: output, data, model, callbacks, trainer, fit, test, report."""

import csv
import dataclasses
import io
import json
import logging
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightship import storage
from lightship.callbacks.ema import EMA
from lightship.callbacks.predictions import PredictionLogger
from lightship.callbacks.preemption import StopRequest
from lightship.callbacks.progress import Progress, build_progress
from lightship.callbacks.saving import Saving
from lightship.callbacks.seeding import StepSeeding
from lightship.callbacks.throughput import Throughput
from lightship.checkpoint import load_plain
from lightship.cli import Command
from lightship.config import Config
from lightship.data.module import ImageData
from lightship.exits import ConfigError, DataError
from lightship.model.module import ImageClassifier
from lightship.output import RunOutput, shown_config
from lightship.report import ReportData, environment_facts, write_report
from lightship.tracking import MetricsTable, Tracker, run_id, start_tracking, upload_offline_run


def fit(command: Command) -> None:
    """Train, test the best checkpoint, report. Goes on from the newest good checkpoint."""
    config = command.config
    stop = StopRequest()
    stop.install()
    progress = _start(config)
    output = RunOutput(config, progress.note)
    if output.is_done():
        return
    store, newest = output.open()

    data = _data(config, progress)
    data.load_manifests(output.at("data"), need="train")
    for part in ("train", "val"):
        if part in data.manifests:
            data.decode(part)
            stop.raise_if_set("nothing was trained yet")

    torch.manual_seed(config.run.seed)
    model = _build_model(config, data)

    tracking_id = run_id(output.tracking_id())
    output.keep_tracking_id(tracking_id)
    scratch_path = output.scratch_path()
    environment = environment_facts()
    tracker = start_tracking(
        config.run.tracking,
        project=config.run.project,
        run_id=tracking_id,
        name=storage.base_name(output.url),
        config=shown_config(config),
        scratch_path=scratch_path,
        environment=environment,
        note=progress.note,
    )
    table = MetricsTable(output.url, resume_step=newest.step if newest else None)

    callbacks = [
        StepSeeding(config.run.seed),
        *([EMA(config.model.ema_decay)] if config.model.ema_decay else []),
        *_early_stopping(config, data),
        *_prediction_logger(config, data, tracker),
        progress,
        Throughput(config.data.global_batch_size, config.trainer.log_every_n_steps),
        Saving(
            store,
            facts={"class_names": data.class_names, "tracking_id": tracking_id},
            stop=stop,
            monitor=config.trainer.monitor,
            every_steps=config.run.checkpoint_every_steps,
            every_s=config.run.checkpoint_every_s,
        ),
    ]
    trainer = _build_trainer(config, callbacks, [table, *([tracker] if tracker else [])], store)
    progress.note(_first_line(config, data, model, newest.step if newest else None))
    try:
        trainer.fit(model, datamodule=data, ckpt_path=store.url_of(newest) if newest else None)
        store.wait()
    except BaseException as error:
        if tracker:
            tracker.finish(getattr(error, "exit_code", 1))
        raise

    best = store.best()
    assert best is not None, "a finished fit has a checkpoint"
    numbers = {"steps": float(trainer.global_step), "best_step": float(best.step)}
    validated = next((row for row in table.rows if row["step"] == best.step), {})
    numbers |= {name: value for name, value in validated.items() if name.startswith("val/")}
    split = next((name for name in ("test", "val") if name in data.manifests), None)
    if split:
        model.load_state_dict(store.load_checkpoint(store.url_of(best))["state_dict"])
        numbers |= _evaluate(config, data, model, split, progress)
    report = _report_data(config, data, model, table, numbers, split, environment)
    write_report(output.url, report)
    if tracker:
        final = {name: value for name, value in numbers.items() if not name.startswith("val/")}
        tracker.log_metrics(final, trainer.global_step)
        if report.confusion is not None:
            tracker.log_confusion(report.confusion, data.class_names, f"{split}/confusion")
        tracker.finish(0)
        if storage.is_remote(output.url):
            upload_offline_run(scratch_path, output.url)
    output.mark_done(numbers)
    progress.note(_last_line(numbers, split, output))


def validate(command: Command) -> None:
    """Measure a checkpoint on the validation split."""
    _measure(command, "val")


def test(command: Command) -> None:
    """Measure a checkpoint on the test split."""
    _measure(command, "test")


def predict(command: Command) -> None:
    """Write a table of class and probability for every image under data.root."""
    config = command.config
    progress = _start(config)
    output = RunOutput(config, progress.note)
    model = _load_model(command, output)
    config.data.image_size_px = model.hparams["image_size_px"]
    data = _data(config, progress)
    data.load_unlabelled()
    trainer = _build_trainer(config, [progress])
    rows = []
    for ids, probabilities in trainer.predict(model, datamodule=data) or []:
        top = probabilities.float().topk(min(5, len(model.class_names)))
        for sample, values, classes in zip(
            ids.tolist(), *map(torch.Tensor.tolist, top), strict=True
        ):
            if sample >= 0:
                names = [model.class_names[index] for index in classes]
                rows.append((data.manifests["predict"].name(sample), names, values))
    url = command.predictions or output.at("predictions.csv")
    storage.write_bytes(url, _predictions_table(rows, url))
    progress.note(f"{len(rows)} predictions: {storage.redact(url)}")


def _start(config: Config) -> Progress:
    """The progress callback, and Lightning told to leave the talking to it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_float32_matmul_precision("high")
    return build_progress(config.run.log_format)


def _data(config: Config, progress: Progress) -> ImageData:
    parts = config.trainer.accumulate_grad_batches
    return ImageData(config.data, config.run.seed, parts, progress.note)


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
        optim=dataclasses.asdict(config.optim),
    )
    if config.model.compile != "none":
        model.compile_net(config.model.compile)
    return model


def _early_stopping(config: Config, data: ImageData) -> list[Callback]:
    trainer = config.trainer
    if not trainer.early_stopping_patience:
        return []
    if "val" not in data.manifests:
        raise ConfigError(
            "--trainer.early_stopping_patience needs a validation split: set --data.val_fraction"
        )
    mode = "min" if trainer.monitor.endswith("loss") else "max"
    return [EarlyStopping(trainer.monitor, patience=trainer.early_stopping_patience, mode=mode)]


def _build_trainer(
    config: Config,
    callbacks: list[Callback],
    loggers: list[Logger] | None = None,
    checkpoint_io: CheckpointIO | None = None,
) -> Trainer:
    asked = config.trainer
    parts = asked.accumulate_grad_batches
    try:
        return Trainer(
            accelerator=asked.accelerator,
            devices=1 if asked.devices == "auto" else int(asked.devices),
            precision=asked.precision,  # type: ignore[arg-type]
            max_epochs=asked.max_epochs,
            max_steps=asked.max_steps,
            accumulate_grad_batches=parts,
            gradient_clip_val=asked.gradient_clip_val or None,
            log_every_n_steps=asked.log_every_n_steps,
            check_val_every_n_epoch=asked.check_val_every_n_epoch,
            # Lightning counts parts, the user global batches.
            limit_train_batches=parts * (asked.limit_train_batches or 0) or 1.0,
            limit_val_batches=asked.limit_val_batches or 1.0,
            limit_test_batches=asked.limit_test_batches or 1.0,
            deterministic=asked.deterministic,
            callbacks=callbacks,
            logger=loggers or False,
            plugins=[checkpoint_io] if checkpoint_io else [],
            enable_checkpointing=checkpoint_io is not None,
            use_distributed_sampler=False,  # order.py is the sampler
            enable_progress_bar=False,  # callbacks/progress.py is the bar
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
    except (MisconfigurationException, ValueError) as error:
        flags = ", ".join(
            f"--trainer.{name} {getattr(asked, name)}"
            for name in ("accelerator", "devices", "precision")
        )
        raise ConfigError(f"Lightning refuses {flags}: {str(error).splitlines()[0]}") from None


def _evaluate(
    config: Config, data: ImageData, model: ImageClassifier, split: str, progress: Progress
) -> dict[str, float]:
    """Metrics of `model` over every sample of a split, by a trainer without training's callbacks.

    (Without EMA above all: the weights are the averaged ones already.)
    """
    trainer = _build_trainer(config, [progress])
    run = trainer.test if split == "test" else trainer.validate
    run(model, datamodule=data, verbose=False)
    names = ("loss", "acc", "top5", "num_samples")
    measured = model.eval_metrics
    return {f"{split}/{name}": float(measured[name]) for name in names if name in measured}


def _measure(command: Command, split: str) -> None:
    """`validate` and `test`: print a checkpoint's metrics and keep them in the report's folder."""
    config = command.config
    progress = _start(config)
    output = RunOutput(config, progress.note)
    model = _load_model(command, output)
    config.data.image_size_px = model.hparams["image_size_px"]
    data = _data(config, progress)
    data.load_manifests(None, need=split)
    if data.class_names != model.class_names:
        raise DataError(
            f"--data.root has the classes {_few(data.class_names)}, the checkpoint "
            f"{_few(model.class_names)}"
        )
    numbers = _evaluate(config, data, model, split, progress)
    url = output.at("report", f"{split}.json")
    storage.write_bytes(url, json.dumps(numbers, indent=1).encode())
    progress.note(f"{_numbers_line(numbers, split)}; {storage.redact(url)}")


def _load_model(command: Command, output: RunOutput) -> ImageClassifier:
    """The model of `ckpt_path` (best, last or a URL), rebuilt from the checkpoint alone."""
    choice = command.ckpt_path or "best"
    store = output.checkpoints()
    if choice in ("best", "last"):
        commit = store.best() if choice == "best" else store.newest()
        if commit is None:
            raise ConfigError(f"no good checkpoint under --run.output {storage.redact(output.url)}")
        checkpoint = store.load_checkpoint(store.url_of(commit))
    else:
        checkpoint = load_plain(storage.read_bytes(choice), storage.redact(choice))
    if not {"state_dict", "hyper_parameters"} <= set(checkpoint):
        raise ConfigError(f"--ckpt_path {storage.redact(choice)} is no checkpoint of lightship's")
    model = ImageClassifier(**{**checkpoint["hyper_parameters"], "weights": None})
    model.load_state_dict(checkpoint["state_dict"])
    return model


def _prediction_logger(
    config: Config, data: ImageData, tracker: Tracker | None
) -> list[PredictionLogger]:
    if not config.run.log_images or "val" not in data.manifests:
        return []
    examples = data.examples("val", config.run.log_images)
    return [PredictionLogger(*examples, data.class_names, tracker)]


def _report_data(
    config: Config,
    data: ImageData,
    model: ImageClassifier,
    table: MetricsTable,
    numbers: dict[str, float],
    split: str | None,
    environment: dict[str, Any],
) -> ReportData:
    """What the report shows: above all what the best checkpoint makes of the evaluated split."""
    predictions = []
    if split and config.run.log_images:
        images, labels, _ = data.examples(split, config.run.log_images)
        with torch.no_grad():
            shares = model.eval().cpu()(images).float().softmax(1)
        for image, label, share in zip(images, labels, shares, strict=True):
            guess = int(share.argmax())
            names = model.class_names[int(label)], model.class_names[guess]
            predictions.append((image.permute(1, 2, 0).numpy(), *names, float(share[guess])))
    confusion = model.eval_metrics.get("confusion") if split else None
    return ReportData(
        title=storage.base_name(str(config.run.output)),
        config=shown_config(config),
        rows=table.rows,
        final=numbers,
        class_names=model.class_names,
        confusion=None if confusion is None else confusion.numpy(),
        predictions=predictions,
        environment=environment,
        skipped=[name for names in data.skipped.values() for name in names],
    )


def _predictions_table(rows: list[tuple[str, list[str], list[float]]], url: str) -> bytes:
    """CSV, or JSON lines by the name's ending: path, class, probability, top 5."""
    text = io.StringIO()
    if url.endswith(".jsonl"):
        for path, names, shares in rows:
            best = [[name, round(share, 6)] for name, share in zip(names, shares, strict=True)]
            row = {"path": path, "class": names[0], "probability": best[0][1], "top5": best}
            text.write(json.dumps(row) + "\n")
    else:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "class", "probability", "top5"])
        for path, names, shares in rows:
            top5 = " ".join(
                f"{name}:{share:.6f}" for name, share in zip(names, shares, strict=True)
            )
            writer.writerow([path, names[0], f"{shares[0]:.6f}", top5])
    return text.getvalue().encode()


def _first_line(config: Config, data: ImageData, model: ImageClassifier, step: int | None) -> str:
    sizes = ", ".join(f"{len(manifest)} {split}" for split, manifest in data.manifests.items())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    start = f", from step {step}" if step is not None else ""
    return (
        f"training {config.model.net} ({parameters / 1e6:.2f} M parameters) on "
        f"{storage.redact(config.data.root)}: {sizes} images of {data.image_size_px} px in "
        f"{len(data.class_names)} classes, to {storage.redact(str(config.run.output))}{start}"
    )


def _last_line(numbers: dict[str, float], split: str | None, output: RunOutput) -> str:
    report = storage.redact(output.at("report", "report.html"))
    return f"done: {_numbers_line(numbers, split)}; report: {report}"


def _numbers_line(numbers: dict[str, float], split: str | None) -> str:
    shown = [f"{key} {value:.4g}" for key, value in numbers.items() if key.startswith(f"{split}/")]
    return ", ".join(shown) or "no evaluation split"


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")
