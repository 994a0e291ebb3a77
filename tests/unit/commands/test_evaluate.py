"""Classes of a split are matched to a checkpoint's by name."""

import re

import numpy as np
import pytest

from lightship.commands.evaluate import _with_classes
from lightship.data.manifest import Manifest
from lightship.errors import DataError


def split(names: list[str], label: list[int]) -> Manifest:
    count = len(label)
    return Manifest(
        root="images",
        files=[f"{i}.png" for i in range(count)],
        file_index=np.arange(count),
        offset=np.zeros(count, np.int64),
        length=np.ones(count, np.int64),
        label=np.array(label, np.uint8 if min(label) >= 0 else np.int8),
        crc32=np.full(count, -1),
        class_names=names,
        container="bytes",
        encoding="image",
    )


@pytest.mark.parametrize(
    ("names", "label", "expected"),
    [
        (["ant", "bee", "caf\u00e9"], [0, 1, 2], [0, 1, 2]),
        (["caf\u00e9", "bee", "ant"], [0, 1, 2, 0], [2, 1, 0, 2]),
        (["caf\u00e9", "ant"], [0, 1, 1], [2, 0, 0]),
        (["bee"], [0, 0], [1, 1]),
        (["bee", "dog"], [0, 0], [1, 1]),  # a class without images
        (["bee", "ant"], [0, -1, 1], [1, -1, 0]),
    ],
)
def test_labels_are_those_of_the_checkpoint(
    names: list[str], label: list[int], expected: list[int]
) -> None:
    of_checkpoint = ["ant", "bee", "cafe\u0301"]  # as macOS writes it
    matched = _with_classes(split(names, label), of_checkpoint, "test")
    assert matched.label.tolist() == expected
    assert matched.files == split(names, label).files
    assert len(matched.class_names) == 3


def test_only_classes_that_the_checkpoint_lacks_are_named() -> None:
    names = [f"class {i}" for i in range(9)]
    with pytest.raises(
        DataError, match=re.escape("not know: class 3, class 8; it knows 7 classes")
    ):
        _with_classes(split(names, [0, 3, 8]), [*names[:3], *names[4:8]], "test")
    others = [f"other {i}" for i in range(6)]
    shown = ", ".join(others[:5]) + ", ... (6); it knows 9"
    with pytest.raises(DataError, match=re.escape(f"not know: {shown}")):
        _with_classes(split(others, list(range(6))), names, "test")
