"""Labels that are numbers: which of them make classes, and which are something else."""

import re

import numpy as np
import pytest

from lightship.data.manifest import Manifest
from lightship.data.sources.build_manifests import build_manifests
from lightship.data.sources.parts import Found, Label, Part
from lightship.errors import DataError


def built(names: list[str] | None = None, **splits: list[Label]) -> dict[str, Manifest]:
    parts = [
        Part(split, ["x"], [0] * len(labels), range(len(labels)), [1] * len(labels), labels)
        for split, labels in splits.items()
    ]
    return build_manifests(Found(parts, class_names=names), "root", "root")


NO_CLASSES: dict[str, list[Label]] = {
    "dates": [20240101, 20240102, 20240103],
    "seconds": [1_700_000_000, 1_700_000_100],
    "postcodes": [10115, 80331, 20095],
    "years": [2019, 2020, 2021],
    "int64's largest": [2**63 - 1, 0],
    "above int64": [2**64, 0],
}


@pytest.mark.parametrize("case", NO_CLASSES)
def test_numbers_far_above_their_count_are_refused(case):
    labels = NO_CLASSES[case]
    with pytest.raises(DataError, match=f"{len(set(labels))} different numbers up to") as error:
        built(train=labels * 9, val=labels[:1])
    assert str(max(map(int, labels)))[:4] in str(error.value)  # type: ignore[arg-type]
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("lowest", [-1, -(2**63) - 1])
@pytest.mark.parametrize("names", [None, ["a", "b"]])
def test_negative_numbers_are_refused(lowest, names):
    with pytest.raises(DataError, match="1 labels of val are out of range, such as -"):
        built(names, train=[0, 1], val=[1, lowest])


@pytest.mark.parametrize("label", [2, 2**63, 20240101])
def test_numbers_without_a_name_in_a_list_of_classes_are_refused(label):
    with pytest.raises(DataError, match=f"such as {label}; with 2 classes they must be 0 to 1"):
        built(["a", "b"], train=[0, 1, label])


def test_gaps_are_named_and_allowed(caplog):
    manifests = built(train=[1, 2, 3], val=[3, 1])
    assert re.search(r"1 of 4 classes have no image: no label is 0;", caplog.text)
    assert manifests["train"].class_names == ["0", "1", "2", "3"]
    some_of_imagenet: list[Label] = [0, 217, 482, 491, 701]
    assert len(built(train=some_of_imagenet)["train"].class_names) == 702
    assert re.search("697 of 702 classes have no image", caplog.text)
    caplog.clear()
    manifest = built(train=list(range(5000)))["train"]
    assert not caplog.messages
    np.testing.assert_array_equal(manifest.label, np.arange(5000))
    assert manifest.label.dtype == np.int64
