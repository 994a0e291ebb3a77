"""One pass over images that gives the features of a net's head, shared by all ranks."""

import hashlib
import json
import logging
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer

from lightship.console.display import Display
from lightship.console.work import work_progress
from lightship.data.batch import NOT_COUNTED
from lightship.data.columns import Pieces
from lightship.data.decoded_cache import add_content
from lightship.data.feature_store import FeatureStore, Rows
from lightship.data.module import ImageData
from lightship.distributed import comm
from lightship.models.classifier import ImageClassifier
from lightship.models.head import Head, evaluation_mode

logger = logging.getLogger(__name__)
_BATCH = 64  # of which ROWS is a multiple
MAX_SAMPLES, MIN_PER_CLASS, MAX_TOTAL = 20_000, 50, 100_000


def compute_features(
    trainer: Trainer,
    model: ImageClassifier,
    head: Head,
    split: str,
    ids: np.ndarray,
    folder_url: str,
    display: Display,
) -> Rows | None:
    """The features of samples, without augmentation, in the fit's precision. Every rank; blocks.

    Batches are the same for any number of ranks, which take turns. What is done is kept: a start
    after a kill goes on after the last part that was written.

    Args:
        trainer: It is in a fit, and its model is on the device.
        model: The model.
        head: The last layer of the model's net.
        split: Name of the split.
        ids: [N] int64 samples, ascending.
        folder_url: Where they are kept; see `FeatureStore`.
        display: Shows progress, on rank 0.

    Returns:
        In the order of `ids`, on rank 0; None on the others.

    Raises:
        ConfigError: See `Head.check`.
    """
    data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
    store, done, again = _opened(trainer, model, head, split, ids, folder_url)
    # This start counts bad images itself, so it reads those again that an earlier one could not.
    parts = [ids_in_batches(each, trainer.world_size) for each in (ids[again], ids[done:])]
    batches = np.concatenate(parts)
    loader = data.listed_dataloader(split, batches[trainer.global_rank :: trainer.world_size])
    added = done - len(again)
    with (
        evaluation_mode(model.net),
        trainer.precision_plugin.forward_context(),
        work_progress(display, "images") as show,
    ):
        if len(batches):
            for number, batch in enumerate(loader):
                pixels = model.normalized(batch.images)
                if number == 0:
                    comm.on_every_rank(partial(head.check, pixels))
                values = head.features(pixels).cpu().numpy()
                mine = values, batch.labels.cpu().numpy(), batch.ids.cpu().numpy()
                for rows, labels, row_ids in comm.gather_to_rank_0(mine):
                    assert store is not None
                    is_sample = row_ids != NOT_COUNTED
                    store.append(Rows(rows[is_sample], labels[is_sample]))
                    added += int(is_sample.sum())
                    show(added, len(ids))
    data.count_bad_samples()
    return store.rows() if store else None


def _opened(
    trainer: Trainer,
    model: ImageClassifier,
    head: Head,
    split: str,
    ids: np.ndarray,
    folder_url: str,
) -> tuple[FeatureStore | None, int, np.ndarray]:
    """(store, on rank 0; see `FeatureStore.load`), without rows of another net. Every rank."""
    data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
    labels = data.manifests[split].label[ids]
    store = comm.on_rank_0(
        lambda: FeatureStore(folder_url, _key(trainer, model, head, split, ids), labels)
    )
    done, again = comm.broadcast_from_rank_0(lambda: store.load() if store else (0, ids[:0]))
    if done and not _is_current(trainer, model, head, split, ids, store):
        logger.info(
            f"{split}: the net gives other features than those kept; they are computed again"
        )
        return store, 0, ids[:0]
    return store, done, again


def _is_current(
    trainer: Trainer,
    model: ImageClassifier,
    head: Head,
    split: str,
    ids: np.ndarray,
    store: FeatureStore | None,
) -> bool:
    """Whether rows that were loaded are what the net gives now; else they are discarded.

    The key of a store does not have the code of the net. Every rank computes; blocks.
    """
    data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
    batches = ids_in_batches(ids[:_BATCH], trainer.world_size)
    (batch,) = data.listed_dataloader(split, batches[trainer.global_rank :: trainer.world_size])
    with evaluation_mode(model.net), trainer.precision_plugin.forward_context():
        values = head.features(model.normalized(batch.images)).cpu().numpy()

    def compared() -> bool:
        assert store is not None
        is_sample = batch.ids.cpu().numpy() != NOT_COUNTED
        rows = Rows(values[is_sample], batch.labels.cpu().numpy()[is_sample])
        is_current = store.begins_with(rows)
        if not is_current:
            store.discard()
        return is_current

    return comm.broadcast_from_rank_0(compared)


def ids_in_batches(ids: np.ndarray, world_size: int) -> np.ndarray:
    """Ids [N] in batches [K, B], padded with NOT_COUNTED; K is a multiple of `world_size`."""
    rounds = -(-len(ids) // (_BATCH * world_size))
    batches = np.full((rounds * world_size, _BATCH), NOT_COUNTED, dtype=np.int64)
    batches.reshape(-1)[: len(ids)] = ids
    return batches


def balanced_ids(
    labels: np.ndarray,
    counts: np.ndarray,
    max_samples: int = MAX_SAMPLES,
    min_per_class: int = MIN_PER_CLASS,
) -> np.ndarray:
    """Ids of at most `max_samples` samples, or `min_per_class` of each class if that is more.

    That is at most MAX_TOTAL, or one of each class if there are more classes. Large classes are cut
    to one size; their samples are evenly spaced.

    Takes memory of the result and a piece of the labels.

    Args:
        labels: [N] of any integer type, none of them unlabelled.
        counts: [C] int64, samples of each class.
        max_samples: Bound of all.
        min_per_class: Samples of a class that are taken within MAX_TOTAL.

    Returns:
        [M] int64, ascending.
    """
    enough = np.minimum(counts, min_per_class).sum()
    bound = max(max_samples, min(int(enough), MAX_TOTAL))
    low, high = 1, int(counts.max())
    while low < high:  # the largest size that fits
        middle = (low + high + 1) // 2
        fits = np.minimum(counts, middle).sum() <= bound
        low, high = (middle, high) if fits else (low, middle - 1)
    starts = np.cumsum(counts) - counts
    wanted = [
        start + np.linspace(0, count - 1, min(count, low)).astype(np.int64)
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True)
        if count
    ]
    return _ids_at(labels, starts, np.concatenate(wanted))


def _ids_at(labels: np.ndarray, starts: np.ndarray, places: np.ndarray) -> np.ndarray:
    """`np.sort(np.argsort(labels, kind="stable")[places])`, in pieces.

    Args:
        labels: [N] of any integer type.
        starts: [C] int64, the first place of each class in that order.
        places: [M] int64, ascending.
    """
    found: list[np.ndarray] = []
    first, reached = 0, starts.copy()
    for piece in Pieces(labels):
        sizes = np.bincount(piece, minlength=len(starts))
        lows, highs = np.searchsorted(places, [reached, reached + sizes])
        numbers = np.flatnonzero(lows < highs).tolist()
        taken = [places[lows[number] : highs[number]] - reached[number] for number in numbers]
        begins = (np.cumsum(sizes) - sizes)[numbers].tolist()
        in_piece = [begin + each for begin, each in zip(begins, taken, strict=True)]
        if in_piece:
            found.append(first + np.argsort(piece, kind="stable")[np.concatenate(in_piece)])
        reached += sizes
        first += len(piece)
    return np.sort(np.concatenate(found))


def _key(trainer: Trainer, model: ImageClassifier, head: Head, split: str, ids: np.ndarray) -> str:
    """Hex digest of what features depend on, but for the code of the net."""
    data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
    names = ("net", "image_size_px", "interpolation", "eval_crop", "mean", "std", "channels_last")
    about: dict[str, Any] = {name: model.hparams[name] for name in names}
    about |= {"precision": str(trainer.precision), "split": data.manifests[split].fingerprint()}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    digest.update(ids.astype("<i8").tobytes())
    manifest = data.manifests[split]
    add_content(digest, manifest, manifest.file_index[ids])
    own = {id(each) for each in head.parameters()}
    for name, value in model.net.state_dict(keep_vars=True).items():
        if id(value) not in own:
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
