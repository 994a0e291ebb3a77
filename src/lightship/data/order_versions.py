"""The order of a split in the version that a run began with."""

from lightship import versions
from lightship.data.manifest import Manifest
from lightship.data.order import BlockShuffle, Order, Shuffle
from lightship.data.sorted_order import SortedOrder

NEWEST = versions.VERSIONS["order"]
FIRST = 1
"""That of checkpoints that name none."""


def order_of(manifest: Manifest, global_batch_size: int, seed: int, version: int = NEWEST) -> Order:
    """The order of a split, in blocks unless the split is small.

    Args:
        manifest: The training split.
        global_batch_size: Samples per optimizer step over all ranks.
        seed: The run's seed.
        version: Of the order.

    Raises:
        ConfigError: The batch is larger than the split.
    """
    count, size_bytes = len(manifest), manifest.size_bytes
    if version == FIRST:
        edges = None if manifest.is_small else manifest.block_edges()
        return SortedOrder(count, global_batch_size, seed, edges, size_bytes)
    if manifest.is_small:
        return Shuffle(count, global_batch_size, seed)
    return BlockShuffle(manifest.blocks(), global_batch_size, seed, size_bytes)
