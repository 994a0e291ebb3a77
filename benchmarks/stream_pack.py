"""The peers' formats, made of class folders by each peer's own tool in its own environment.

python -m benchmarks.stream_pack webdataset|litdata|mosaicml SOURCE TARGET
"""

import random
import sys
from pathlib import Path

Sample = tuple[Path, int]


def samples(source: str) -> list[Sample]:
    """The images below the folder and their classes' numbers, shuffled once as its users do."""
    paths = sorted(Path(source).glob("*/*.jpg"))
    names = sorted({path.parent.name for path in paths})
    numbered = [(path, names.index(path.parent.name)) for path in paths]
    return random.Random(0).sample(numbered, len(numbered))


def webdataset(source: str, target: str) -> None:
    from webdataset import ShardWriter

    from benchmarks.stream_webdataset import SHARDS

    numbered = samples(source)
    Path(target).mkdir(parents=True)
    pattern = f"{target}/train-%06d.tar"
    with ShardWriter(pattern, maxcount=-(-len(numbered) // SHARDS), verbose=0) as writer:
        for path, label in numbered:
            writer.write({"__key__": path.stem, "jpg": path.read_bytes(), "cls": label})
    assert len(list(Path(target).iterdir())) == SHARDS, "use a COUNT of tens"


def litdata_sample(sample: Sample) -> dict:
    from litdata import Jpeg

    return {"image": Jpeg(path=str(sample[0])), "class": sample[1]}


def litdata(source: str, target: str) -> None:
    """Chunks of 64 MB, its default."""
    from litdata import optimize

    numbered = samples(source)
    optimize(litdata_sample, numbered, target, chunk_bytes="64MB", num_workers=2)


def mosaicml(source: str, target: str) -> None:
    """Shards of 64 MiB, its default."""
    from streaming import MDSWriter

    columns = {"image": "bytes", "class": "int"}
    with MDSWriter(out=target, columns=columns, hashes=["sha1", "xxh64"]) as writer:
        for path, label in samples(source):
            writer.write({"image": path.read_bytes(), "class": label})


if __name__ == "__main__":
    {"webdataset": webdataset, "litdata": litdata, "mosaicml": mosaicml}[sys.argv[1]](*sys.argv[2:])
