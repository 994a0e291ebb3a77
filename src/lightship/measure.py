"""What a run's checkpoint is asked for: validate, test, predict."""

import csv
import io
import itertools
import json

import torch

from lightship import ranks, storage
from lightship.cli import Command
from lightship.exits import DataError
from lightship.output import RunOutput
from lightship.restored import load_model
from lightship.trainer import build_data, build_trainer, evaluate, numbers_line, start_progress


def validate(command: Command) -> None:
    """Measure a checkpoint on the validation split."""
    _measure(command, "val")


def test(command: Command) -> None:
    """Measure a checkpoint on the test split."""
    _measure(command, "test")


def predict(command: Command) -> None:
    """Write a table of class and probability for every image under data.root."""
    config = command.config
    progress = start_progress(config)
    output = RunOutput(config, progress.note)
    model = load_model(command, progress.note)
    config.data.image_size_px = model.hparams["image_size_px"]
    data = build_data(config, progress)
    data.load_unlabelled()
    trainer = build_trainer(config, [progress])
    found = []
    for ids, probabilities in trainer.predict(model, datamodule=data) or []:
        top = probabilities.float().topk(min(5, len(model.class_names)))
        for sample, values, classes in zip(
            ids.tolist(), *map(torch.Tensor.tolist, top), strict=True
        ):
            if sample >= 0:
                names = [model.class_names[index] for index in classes]
                found.append((sample, names, values))
    everything = ranks.gather(found)
    if not ranks.is_first():
        return
    rows = [
        (data.manifests["predict"].name(sample), names, values)
        for sample, names, values in sorted(itertools.chain(*everything))
    ]
    url = command.predictions or output.at("predictions.csv")
    storage.write_bytes(url, _predictions_table(rows, url))
    progress.note(f"{len(rows)} predictions: {storage.redact(url)}")


def _measure(command: Command, split: str) -> None:
    """`validate` and `test`: print a checkpoint's metrics and keep them in the report's folder."""
    config = command.config
    progress = start_progress(config)
    output = RunOutput(config, progress.note)
    model = load_model(command, progress.note)
    config.data.image_size_px = model.hparams["image_size_px"]
    data = build_data(config, progress)
    data.load_manifests(None, need=split)
    if data.class_names != model.class_names:
        raise DataError(
            f"--data.root has the classes {_few(data.class_names)}, the checkpoint "
            f"{_few(model.class_names)}"
        )
    numbers = evaluate(config, data, model, split, progress)
    if not ranks.is_first():
        return
    url = output.at("report", f"{split}.json")
    storage.write_bytes(url, json.dumps(numbers, indent=1).encode())
    progress.note(f"{numbers_line(numbers, split)}; {storage.redact(url)}")


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


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")
