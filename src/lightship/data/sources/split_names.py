"""Splits by name: which words in the names of folders and files stand for train, val and test."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import reduce

from lightship.errors import DataError

SPLITS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""Word -> split, as the Hugging Face `datasets` library reads them."""
_WORD = re.compile(
    f"({'|'.join(sorted(SPLITS, key=len, reverse=True))})(?:sets?|data|images|imgs)?"
)
_LETTERS = re.compile(r"[^\W\d_]+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")


def _tokens(name: str) -> list[str]:
    runs = [_CAMEL.split(run) for run in _LETTERS.findall(name)]
    return [token.lower() for run in runs for token in run]


def split_words(name: str) -> list[str]:
    """The words in a name that stand for a split: `seg_train`, `TrainSet`, `testset`, `val2017`."""
    return [found[1] for token in _tokens(name) if (found := _WORD.fullmatch(token))]


def split_of_name(name: str) -> str | None:
    """The split that a name has a word of; None without one or with words of several."""
    splits = {SPLITS[word] for word in split_words(name)}
    return splits.pop() if len(splits) == 1 else None


def template(name: str) -> str:
    """A name without its split word: `seg_{}` of seg_train and seg_test."""
    word = split_words(name)[0]
    return re.sub(word, "{}", name.lower(), count=1)


def splits_of_files(paths: Sequence[str], root: str) -> list[str] | None:
    """The split of each shard, by its base name first (train-0001.tar, test/00.parquet).

    A folder above all of them counts only if its whole name is a split's (test/, not my-test-set/).

    Raises:
        DataError: Some name a split and some do not, or one names several.
    """
    words = [split_words(path.rpartition("/")[2]) for path in paths]
    if any(len({SPLITS[word] for word in each}) > 1 for each in words):
        # What all have in common is the set's name: train-station-test-000.tar.
        shared = reduce(lambda a, b: a & b, map(Counter, words))
        words = [list((Counter(each) - shared).elements()) for each in words]
    common = os.path.commonpath([path.rpartition("/")[0] for path in paths])
    above = len(list(filter(None, common.split("/"))))
    named = [_split_of_shard(*each, above, root) for each in zip(paths, words, strict=True)]
    if not any(named):
        return None
    for path, split in zip(paths, named, strict=True):
        if split is None:
            raise DataError(f"{root}: {path} names no split (train, val or test), but others do")
    return [split for split in named if split]


def _split_of_shard(path: str, words: Sequence[str], above: int, root: str) -> str | None:
    splits = {SPLITS[word] for word in words}
    if len(splits) > 1:
        raise DataError(f"{root}: {path} names several splits ({', '.join(words)}); rename it")
    if splits:
        return splits.pop()
    for depth, folder in reversed(list(enumerate(path.split("/")[:-1]))):
        split = SPLITS.get(folder.lower()) if depth < above else split_of_name(folder)
        if split:
            return split
    return None
