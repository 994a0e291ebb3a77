"""Arms `lightship`: its packed shards (mode `packed`), class folders as they are (mode `folders`).

`python -m tests.benchmarks.stream_lightship pack SOURCE TARGET` packs for the first of them. While
lightship cannot stream, the missing import makes the arms "not run".
"""

import sys
from collections.abc import Iterable
from typing import Any

from tests.benchmarks.stream_arm import BATCH, run


def open_batches(root: str, mode: str, cache: str) -> Iterable[Any]:
    """Shuffled batches of (images [n, 3, 224, 224] uint8, labels [n]); an iteration an epoch."""
    from lightship.data import streaming

    return streaming.open_batches(root, BATCH)


def pack(source: str, target: str) -> None:
    """Class folders at the URL `source` into shards at the URL `target`."""
    from lightship.data import pack

    pack.pack(source, target)


if __name__ == "__main__":
    if sys.argv[1] == "pack":
        pack(*sys.argv[2:])
    else:
        run(open_batches)
