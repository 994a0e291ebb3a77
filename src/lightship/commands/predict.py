"""`lightship predict` in reading order: model, images, parts of the table, and the table."""

import hashlib
import json
import logging
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer

from lightship import devices, storage
from lightship.commands.base import Command
from lightship.commands.loading import build_model, load_checkpoint
from lightship.config import Config, DataConfig, place_of
from lightship.console.work import work_progress
from lightship.data.batch import NOT_COUNTED
from lightship.data.module import ImageData
from lightship.data.splits import load_unlabelled
from lightship.distributed import comm
from lightship.distributed.signals import Phase, StopRequest
from lightship.errors import ConfigError, DataError
from lightship.models.classifier import ImageClassifier
from lightship.models.preprocessing import adopt_of_model
from lightship.predict.shards import Division, Parts, Unreadable
from lightship.predict.table import Prediction, Table, check_format
from lightship.predict.writer import ShardWriter
from lightship.training.callbacks.progress import Progress
from lightship.training.trainer import build_data, build_trainer, start_progress

logger = logging.getLogger(__name__)
_NAMED = 20


def predict(command: Command) -> None:
    """Write a table of class and probability for every image under data.root.

    Goes on from the parts that are there.
    """
    with StopRequest(Phase.PREDICT):
        _predict(command)


def _predict(command: Command) -> None:
    config = command.config
    progress = start_progress(config)
    url = command.predictions or storage.join(str(config.run.output), "predictions.csv")
    flag = "--predictions" if command.predictions else "--run.output"
    check_format(url, flag)
    folder = url.removesuffix(storage.base_name(url)) or "."
    comm.broadcast_from_rank_0(lambda: storage.check_writable(folder, flag))
    checkpoint = load_checkpoint(command)
    model = build_model(checkpoint, command)
    adopt_of_model(config.data, model.hparams)
    manifest = load_unlabelled(config.data, leave_out=[url])
    trainer = build_trainer(config, [])

    division = Division(len(manifest), _batch_size(config, trainer, len(manifest)))
    plan = {
        # Cameras give other images the same names and sizes.
        "data.root": comm.broadcast_from_rank_0(partial(place_of, config.data.root)),
        "images": manifest.fingerprint(),
        "model": _fingerprint(checkpoint["hyper_parameters"], model),
        "precision": trainer.precision,
    }
    parts = Parts(url, plan, division, manifest.name, model.class_names)
    found = comm.broadcast_from_rank_0(parts.open)
    data = build_data(config, {"predict": manifest})
    done = found.keys() - _readable_now(found, data, trainer)
    told = f"{len(manifest)} images of {storage.redact(config.data.root)} to {storage.redact(url)}"
    kept = sum(len(division.ids(number)) for number in done)
    logger.info(f"predicting {told}" + (f"; {kept} are done" if kept else ""))
    todo = [number for number in range(division.num_parts) if number not in done]
    if todo:
        _make_parts(parts, todo, model, data, trainer, progress)
    # No rank may end with 0 before the table is there: it would not be started again.
    comm.on_rank_0(partial(_finish, url, parts, config.data, manifest.not_read))


def _batch_size(config: Config, trainer: Trainer, num_images: int) -> int:
    """Images a batch, the same for any number of processes: no more than there are."""
    chips = devices.of(trainer.strategy.root_device).chips
    most = config.data.eval_batch_size * chips
    return -(-min(most, num_images) // chips) * chips


def _fingerprint(hyper_parameters: dict[str, Any], model: ImageClassifier) -> str:
    """Hex digest of all that makes the model: hyper-parameters and weights, wherever they lie.

    The hyper-parameters are those in the checkpoint: the same to every version of lightship.
    """
    digest = hashlib.sha256(json.dumps(dict(hyper_parameters), sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _readable_now(done: dict[int, list[int]], data: ImageData, trainer: Trainer) -> set[int]:
    """The parts with an image that could not be read and now can. Every rank; blocks.

    The limits of an image, or its permissions, may have changed since. The ranks share the images,
    and read nothing else: parts may have a bad image each, and a restart must not lose them.

    Raises:
        DataError: An image cannot be read, and may not be skipped.
    """
    doubtful = [number for number, ids in done.items() if ids]
    if not doubtful:
        return set()
    data.prepare("predict")
    mine = doubtful[trainer.global_rank :: trainer.world_size]

    def read() -> list[int]:
        return [number for number in mine if data.images("predict", np.array(done[number]))]

    readable = {number for each in comm.all_gather(comm.on_every_rank(read)) for number in each}
    if readable:
        logger.info(f"{len(readable)} parts have images that can be read now: predicted again")
    return readable


def _make_parts(
    parts: Parts,
    todo: list[int],
    model: ImageClassifier,
    data: ImageData,
    trainer: Trainer,
    progress: Progress,
) -> None:
    """Predict and write the parts `todo`, this rank its share of them. Every rank; blocks.

    The ranks meet after each round of a part each, so that none waits long for another at the end.
    """
    division = parts.division
    rounds = division.rounds(todo, trainer.world_size)
    mine = [each[trainer.global_rank] for each in rounds]
    ids = np.full((len(mine), division.part_size), NOT_COUNTED, dtype=np.int64)
    for row, number in zip(ids, mine, strict=True):
        if number is not None:
            row[: len(division.ids(number))] = division.ids(number)
    data.predict_batches = ids.reshape(-1, division.batch_size)
    data.prepare("predict")

    manifest = data.manifests["predict"]
    sizes = [sum(len(division.ids(n)) for n in each if n is not None) for each in rounds]
    before = [len(manifest) - sum(sizes[number:]) for number in range(len(rounds) + 1)]
    with work_progress(progress.display, "images") as show:

        def tell(number: int, rows: int) -> None:
            """Rank 0 tells of its own batches at once, of the others' when a round is done."""
            if comm.is_rank_0():
                show(before[number] + rows, len(manifest))

        def meet(number: int) -> None:
            comm.barrier()
            tell(number + 1, 0)

        tell(0, 0)
        trainer.callbacks.append(  # type: ignore[attr-defined]
            ShardWriter(
                parts,
                mine,
                data.unreadable("predict"),
                after_batch=tell,
                after_round=meet,
            )
        )
        trainer.predict(model, datamodule=data, return_predictions=False)
    comm.barrier()  # now all parts of all ranks are durable


def _finish(url: str, parts: Parts, config: DataConfig, not_read: str) -> None:
    """Write the table, remove the parts and log the result. Rank 0; blocks."""
    rows, unreadable, not_finite = _make_table(url, parts, config)
    parts.remove()
    rest = f"; not read: {not_read}" if not_read else ""
    said = f"done: {rows} predictions: {storage.redact(url)}{_left_out(unreadable)}"
    logger.info(said + _without_class(not_finite) + rest)


def _make_table(
    url: str, parts: Parts, config: DataConfig
) -> tuple[int, list[Unreadable], list[str]]:
    """Put all parts together and write the table whole. Rank 0; blocks.

    Returns:
        How many rows it has, what could not be read, and the paths of those images for which the
        net's output is not finite.

    Raises:
        DataError: Too much could not be read. The parts stay.
        ConfigError: The net's output is finite for no image.
    """
    unreadable: list[Unreadable] = []
    not_finite: list[str] = []
    with tempfile.TemporaryDirectory(prefix="lightship-") as folder:
        path = Path(folder, "table")
        with Table(path, url) as table:
            for rows in parts.read():
                unreadable += [row for row in rows if isinstance(row, Unreadable)]
                found = [row for row in rows if isinstance(row, Prediction)]
                not_finite += [row.path for row in found if not row.top5]
                table.add(found)
        _check_unreadable(unreadable, parts.division.num_images, config)
        count = parts.division.num_images - len(unreadable)
        if len(not_finite) == count:
            raise ConfigError(
                "the net's output is not finite for any image: the checkpoint is of a training "
                "that diverged; choose another with --ckpt_path"
            )
        storage.write_file(url, path)
    return count, unreadable, not_finite


def _check_unreadable(unreadable: list[Unreadable], num_images: int, config: DataConfig) -> None:
    count = len(unreadable)
    if not count:
        return
    told = f"{count} of {num_images} images cannot be read; the last: {unreadable[-1].reason}"
    if config.on_error == "raise":
        raise DataError(f"{told}; --data.on_error skip leaves such images out")
    if count == num_images or count > config.max_bad_fraction * num_images:
        raise DataError(
            f"{told}; --data.max_bad_fraction {config.max_bad_fraction:g} allows no more than "
            f"{min(num_images - 1, int(config.max_bad_fraction * num_images))}"
        )


def _left_out(unreadable: list[Unreadable]) -> str:
    if not unreadable:
        return ""
    return f"; left out, because they cannot be read: {_counted([row.path for row in unreadable])}"


def _without_class(not_finite: list[str]) -> str:
    if not not_finite:
        return ""
    return f"; without a class, because the net's output is not finite: {_counted(not_finite)}"


def _counted(paths: list[str]) -> str:
    rest = len(paths) - _NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return f"{len(paths)} ({', '.join(paths[:_NAMED])}{more})"
