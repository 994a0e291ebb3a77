"""Writes what a net predicts while it predicts: part by part, each when its last batch is done."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightship import storage
from lightship.predict.shards import BEST, Parts, Row, Unreadable
from lightship.predict.table import Prediction

_DIGITS = 6


class ShardWriter(Callback):
    """Takes this rank's batches, fetches from the device once a part, and writes beside the net.

    Args:
        parts: Where parts go.
        numbers: This rank's part in each round; None: it has none left, and its batches are empty.
        unreadable: Why an image could not be read, by id; it is filled before the image's batch
            comes.
        after_batch: Called with (round, rows that this rank has of it so far).
        after_round: Called on every rank when its batches of a round are done.
    """

    def __init__(
        self,
        parts: Parts,
        numbers: Sequence[int | None],
        unreadable: Mapping[int, str],
        after_batch: Callable[[int, int], None],
        after_round: Callable[[int], None],
    ) -> None:
        self._parts, self._numbers = parts, numbers
        self._unreadable = unreadable
        self._after_batch, self._after_round = after_batch, after_round
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self._in_flight: Future[None] | None = None

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's best classes on the device; with the last of a part, write it."""
        ids, probabilities = outputs
        self._kept.append((ids, *probabilities.topk(min(BEST, probabilities.shape[1]))))
        number, division = batch_idx // self._parts.division.batches_per_part, self._parts.division
        part = self._numbers[number]
        if part is not None:
            rows = min(len(self._kept) * division.batch_size, len(division.ids(part)))
            self._after_batch(number, rows)
        if len(self._kept) == division.batches_per_part:
            if part is not None:
                self._write(part, pl_module.class_names)  # type: ignore[arg-type]
            self._kept.clear()
            self._after_round(number)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return when all that was predicted is durable. Blocks, within storage's deadlines."""
        self._wait()

    def _write(self, part: int, class_names: Sequence[str]) -> None:
        ids, shares, classes = (
            [item for kept in column for item in kept.tolist()]
            for column in zip(*self._kept, strict=True)
        )
        rows = [
            self._row(sample, [class_names[i] for i in best], share)
            for sample, best, share in zip(ids, classes, shares, strict=True)
            if sample >= 0
        ]
        assert len(rows) == len(self._parts.division.ids(part)), "a part has all of its images"
        self._wait()
        self._in_flight = storage.in_daemon(partial(self._parts.write, part, rows), "part-writer")

    def _row(self, sample: int, names: list[str], shares: list[float]) -> Row:
        path = self._parts.path(sample)
        if sample in self._unreadable:
            return Unreadable(path, self._unreadable[sample])
        if not all(map(math.isfinite, shares)):
            return Prediction(path, [])
        rounded = [round(share, _DIGITS) for share in shares]
        return Prediction(path, list(zip(names, rounded, strict=True)))

    def _wait(self) -> None:
        if self._in_flight is not None:
            in_flight, self._in_flight = self._in_flight, None
            in_flight.result()
