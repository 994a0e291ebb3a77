"""The splits of a root, scanned and written as one table on this node. Without torch."""

from collections.abc import Mapping

from lightship.config import DataConfig
from lightship.data import table_cache
from lightship.data.held_out import hold_out
from lightship.data.manifest import Manifest
from lightship.data.manifest_table import columns_of, write_table
from lightship.data.sources import layouts
from lightship.data.table_cache import Table


def scan_to_table(config: DataConfig) -> Table:
    """The labelled splits as they lie at data.root. Rank 0; blocks.

    Raises:
        DataError: Nothing to train on.
    """
    return store_splits(config, layouts.scan(config.root, config.root_md5))


def store_splits(config: DataConfig, splits: Mapping[str, Manifest]) -> Table:
    """The table of splits, part of train held out where there is no val. Rank 0; blocks.

    The index of a pack that has val, or from which nothing is held out, is that table as it lies.
    """
    held_out = None
    if "val" not in splits and "train" in splits and config.val_fraction:
        held_out = hold_out(splits["train"], config.val_fraction)
    if held_out is None and (columns := columns_of(splits)):
        return Table(columns.digest, columns.size_bytes, None)
    return table_cache.store(lambda path: write_table(path, splits, held_out))
