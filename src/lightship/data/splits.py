"""The splits at --data.root as manifests, found once by rank 0 and mapped by all ranks."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

from lightship import storage
from lightship.config import DataConfig
from lightship.data import decode_ahead, table_cache
from lightship.data.manifest import LABELLED_SPLITS, Manifest
from lightship.data.manifest_npz import load_manifests
from lightship.data.manifest_table import check_table, open_table, write_table
from lightship.data.scanned_table import scan_to_table, store_splits
from lightship.data.sources import layouts, roots
from lightship.data.table_cache import Table
from lightship.data.table_copies import copy_to_node
from lightship.distributed import comm
from lightship.errors import ConfigError, DataError
from lightship.redaction import canonical

logger = logging.getLogger(__name__)


class Scanned(NamedTuple):
    """What `scan_splits` has found."""

    table: Table
    sizes: dict[str, int]
    """Split -> its samples."""


def scan_splits(config: DataConfig, need: str) -> Scanned:
    """The labelled splits as they lie at data.root, for `load_splits`. Every rank; blocks.

    Args:
        config: The data section.
        need: The split that must exist.

    Raises:
        DataError: As `load_splits`.
    """

    def find() -> Scanned:
        table = _scan(config)
        splits = open_table(table_cache.fetch(table))
        _check_split(config, splits, need)
        return Scanned(table, {split: len(manifest) for split, manifest in splits.items()})

    return comm.broadcast_from_rank_0(find)


def load_splits(
    config: DataConfig,
    cache_url: str | None,
    need: str,
    scanned: Scanned | None = None,
    use_saved: bool = True,
) -> dict[str, Manifest]:
    """The labelled splits. Every rank; rank 0 reads the saved table or scans. Blocks.

    Args:
        config: The data section.
        cache_url: Folder that keeps the table beside the run; None: scan every time.
        need: The split that must exist ("train", "val" or "test").
        scanned: Of `scan_splits`, in place of scanning.
        use_saved: Whether to read the table that the folder has: a run with a checkpoint goes on
            with its samples; where there is none, data.root may have changed since.

    Raises:
        DataError: No such split, or nothing to train on.
        NewerVersion: A newer version saved the table.
    """
    splits = _on_every_rank(config, partial(_load_or_scan, config, cache_url, scanned, use_saved))
    _check_split(config, splits, need)
    return splits


def _check_split(config: DataConfig, splits: Mapping[str, Manifest], need: str) -> None:
    if need not in splits:
        instead = ", or run lightship validate" if need == "test" and "val" in splits else ""
        raise DataError(
            f"no {need} split at --data.root {storage.redact(config.root)}: "
            f"found {', '.join(sorted(splits)) or 'nothing'}; give a root with a folder {need}/"
            f"{instead}"
        )


def _scan(config: DataConfig) -> Table:
    return decode_ahead.scanned(config) or scan_to_table(config)


def _load_or_scan(
    config: DataConfig, cache_url: str | None, scanned: Scanned | None, use_saved: bool
) -> Table:
    """The table, on rank 0's node and, with a folder, there. Rank 0; blocks."""
    if cache_url is None:
        return scanned.table if scanned else _scan(config)
    source = f"{canonical(config.root)}\n{config.root_md5}"
    url, older_url = (
        storage.join(cache_url, f"manifest-{hashlib.sha256(text.encode()).hexdigest()[:12]}{kind}")
        for text, kind in ((f"{source}\n{config.val_fraction}", ".table"), (source, ".npz"))
    )
    if use_saved:
        with _scanning_again_if_damaged(), suppress(storage.NotFound):
            table = Table.at(url)
            open_table(table_cache.fetch(table, check_table))
            return table
    if scanned is not None:
        return table_cache.upload(scanned.table, url)
    if use_saved and storage.exists(older_url):  # of a run begun by 0.1.0
        with _scanning_again_if_damaged():
            return table_cache.upload(store_splits(config, load_manifests(older_url)), url)
    return table_cache.upload(_scan(config), url)


@contextmanager
def _scanning_again_if_damaged() -> Iterator[None]:
    """Log a damaged table, and go on: nothing is lost, for it follows from the data."""
    try:
        yield
    except DataError as error:
        logger.warning(f"{error}; scanning --data.root again")


def _on_every_rank(
    config: DataConfig, find: Callable[[], Table], names: Collection[str] = LABELLED_SPLITS
) -> dict[str, Manifest]:
    """The splits, of these names, of the table that rank 0 finds, mapped from one copy a node."""

    def find_and_name() -> tuple[Table, str]:
        table = find()
        needs_id = config.cache_gib and storage.is_remote(config.root)
        return table, _scan_id(table) if needs_id else ""

    table, scan_id = comm.broadcast_from_rank_0(find_and_name)
    columns = copy_to_node(table)
    return _at_local_root(config, open_table(columns, names), scan_id)


def _scan_id(table: Table) -> str:
    """`Manifest.scan_id`: where the table lies, and since when. Rank 0; blocks."""
    if table.url is None:
        return ""
    try:
        made_s = storage.modified_s(table.url)
    except ConfigError as error:  # a file system that does not know
        logger.warning(f"images without checksums are not cached (--data.cache_gib): {error}")
        return ""
    return hashlib.sha256(f"{canonical(table.url)}\n{made_s}".encode()).hexdigest()[:32]


def load_unlabelled(config: DataConfig, leave_out: Sequence[str] = ()) -> Manifest:
    """Every image under data.root as one split without labels. Every rank; blocks.

    Args:
        config: The data section.
        leave_out: URLs of files that the command itself writes.

    Raises:
        DataError: No images there.
    """

    def find() -> Table:
        images = layouts.scan_images(config.root, config.root_md5, leave_out)
        return table_cache.store(lambda path: write_table(path, {"predict": images}))

    return _on_every_rank(config, find, ("predict",))["predict"]


def _at_local_root(
    config: DataConfig, splits: dict[str, Manifest], scan_id: str
) -> dict[str, Manifest]:
    """The same tables on every node, with the path where this node keeps a downloaded archive."""
    root = comm.local_rank_0_first(partial(roots.resolve_root, config.root, config.root_md5))
    return {
        split: dataclasses.replace(table, root=root, scan_id=scan_id).within(config.max_sample_mib)
        for split, table in splits.items()
    }
