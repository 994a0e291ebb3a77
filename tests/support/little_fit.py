"""A short real fit on learnable noise, for what watches a run."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from lightship.data.batch import Batch
from lightship.models.classifier import ImageClassifier

CLASSES = ["ant", "bee", "cat"]
SIZE_PX = 16


def classifier(**options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    defaults = {"mean": [0.5] * 3, "std": [0.25] * 3, "optim": {"name": "adam", "lr": 1e-3}}
    settings = {"net": "litcnn", **defaults, **options}
    return ImageClassifier(class_names=CLASSES, image_size_px=SIZE_PX, **settings)


def batch_of(seed: int, size: int = 6) -> Batch:
    """Images whose brightness tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % len(CLASSES)
    noise = torch.randint(0, 60, (size, 3, SIZE_PX, SIZE_PX), generator=generator)
    images = (noise + 90 * labels[:, None, None, None]).to(torch.uint8)
    return Batch(images, labels, torch.arange(size))


class EndlessLoader:
    """Like the project's own: a length, and no end. `before_each` is called before each batch."""

    def __init__(self, batches: int, before_each: Callable[[], None] = lambda: None) -> None:
        self.batches, self.before_each = batches, before_each

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        seed = 0
        while True:
            self.before_each()
            yield batch_of(seed)
            seed += 1


class ValLoader(EndlessLoader):
    def __iter__(self) -> Iterator[Batch]:
        return (batch_of(1000 + seed) for seed in range(self.batches))


def fit(
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger] = (),
    train_batches: int = 4,
    val_batches: int = 2,
    test: bool = False,
    model: ImageClassifier | None = None,
    before_each_batch: Callable[[], None] = lambda: None,
    **trainer_options: Any,
) -> Trainer:
    """Fit (and test) a classifier on the CPU; the trainer it was done with."""
    options = {"max_epochs": 2, "log_every_n_steps": 10**9, **trainer_options}
    trainer = _trainer(callbacks, loggers, **options)
    model = model or classifier()
    trainer.fit(model, EndlessLoader(train_batches, before_each_batch), ValLoader(val_batches))
    if test:
        trainer.test(model, ValLoader(val_batches), verbose=False)
    return trainer


def evaluate(name: str, callbacks: Sequence[Callback], batches: int) -> None:
    """Test or validate a classifier on the CPU, outside of a fit."""
    run = getattr(_trainer(callbacks), name)
    run(classifier(), ValLoader(batches), verbose=False)


def _trainer(
    callbacks: Sequence[Callback], loggers: Sequence[Logger] = (), **options: Any
) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=list(loggers),
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=Path.cwd(),
        **options,
    )
