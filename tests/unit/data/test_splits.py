"""A split that a command needs and the data set lacks."""

from pathlib import Path

import pytest

from lightship.config import DataConfig
from lightship.data.splits import load_splits
from lightship.errors import DataError
from tests.support.images import little_set, put


@pytest.mark.parametrize(
    ("split", "need", "line"),
    [
        (
            "train",
            "test",
            "found train, val; give a root with a folder test/, or run lightship validate",
        ),
        ("test", "train", "found test; give a root with a folder train/"),
    ],
)
def test_a_split_that_is_not_there_is_named_with_what_to_do(
    split: str, need: str, line: str, tmp_path: Path
) -> None:
    root = put(str(tmp_path / "images"), little_set((split,), per_class=8))
    with pytest.raises(DataError) as error:
        load_splits(DataConfig(root=root), None, need)
    assert str(error.value) == f"no {need} split at --data.root {root}: {line}"
