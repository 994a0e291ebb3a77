"""The splits at --data.root as manifests, found once by rank 0 for all ranks."""

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from functools import partial

from lightship import storage
from lightship.config import DataConfig
from lightship.data.manifest import Manifest, load_manifests, save_manifests, split_validation
from lightship.data.sources import layouts, roots
from lightship.distributed import comm
from lightship.errors import DataError

logger = logging.getLogger(__name__)


def load_splits(config: DataConfig, cache_url: str | None, need: str) -> dict[str, Manifest]:
    """The labelled splits. Every rank; rank 0 reads the saved table or scans. Blocks.

    Args:
        config: The data section.
        cache_url: Folder that keeps the table beside the run; None: scan every time.
        need: The split that must exist ("train", "val" or "test").

    Raises:
        DataError: No such split, or nothing to train on.
        NewerVersion: A newer version saved the table.
    """
    found = comm.broadcast_from_rank_0(partial(_load_or_scan, config, cache_url))
    splits = _at_local_root(config, found)
    if "val" not in splits and "train" in splits and config.val_fraction > 0:
        train, val = split_validation(splits["train"], config.val_fraction)
        splits = {**splits, "train": train}
        if val is not None:
            splits["val"] = val
    if need not in splits:
        instead = "; lightship validate measures val" if need == "test" and "val" in splits else ""
        raise DataError(
            f"no {need} split at --data.root {storage.redact(config.root)}: "
            f"found {', '.join(sorted(splits)) or 'nothing'}{instead}"
        )
    return splits


def _load_or_scan(config: DataConfig, cache_url: str | None) -> dict[str, Manifest]:
    if cache_url is None:
        return layouts.scan(config.root, config.root_md5)
    key = hashlib.sha256(f"{config.root}\n{config.root_md5}".encode()).hexdigest()[:12]
    url = storage.join(cache_url, f"manifest-{key}.npz")
    if storage.exists(url):
        try:
            return load_manifests(url)
        except DataError as error:  # nothing is lost: the table follows from the data
            logger.warning(f"{error}; scanning --data.root again")
    found = layouts.scan(config.root, config.root_md5)
    save_manifests(url, found)
    return found


def load_unlabelled(config: DataConfig, leave_out: Sequence[str] = ()) -> Manifest:
    """Every image under data.root as one split without labels. Every rank; blocks.

    Args:
        config: The data section.
        leave_out: URLs of files that the command itself writes.

    Raises:
        DataError: No images there.
    """
    scan = partial(layouts.scan_images, config.root, config.root_md5, leave_out)
    return _at_local_root(config, {"": comm.broadcast_from_rank_0(scan)})[""]


def _at_local_root(config: DataConfig, splits: dict[str, Manifest]) -> dict[str, Manifest]:
    """The same tables on every node, with the path where this node keeps a downloaded archive."""
    root = comm.local_rank_0_first(partial(roots.resolve_root, config.root, config.root_md5))
    return {split: dataclasses.replace(table, root=root) for split, table in splits.items()}
