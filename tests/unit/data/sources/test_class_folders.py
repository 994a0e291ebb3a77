"""Which folders are splits and which are classes; what can be read in two ways is refused."""

import re

import pytest

from lightship.data.sources.class_folders import read_class_folders
from lightship.errors import DataError

CLASSES = ("ant", "bee", "cat")


def under(*folders: str, classes=CLASSES) -> list[str]:
    """Two images in each class folder of each folder."""
    return [f"{folder}/{name}/{i}.png" for folder in folders for name in classes for i in (0, 1)]


def read(paths: list[str]) -> dict[str, set[str]]:
    """Split -> its classes."""
    pairs = [pair for pair in read_class_folders(sorted(paths), "root").assigned if pair]
    return {split: {name for s, name in pairs if s == split} for split, _ in pairs}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training", "testing"),
        ("Training", "Testing"),
        ("TRAIN", "TEST"),
        ("train_set", "test_set"),
        ("TrainSet", "TestSet"),
        ("trainset", "testset"),
        ("TRAININGDATA", "TESTDATA"),
        ("my-train-data", "my-test-data"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("train/train", "test/test"),
        ("train/train_images", "test/test_images"),
        ("train", "eval"),
        ("train", "evaluation"),
        ("train2017", "test2017"),
        ("train", "test_v2"),
        ("data/training", "data/testing"),
        ("test/train", "test/test"),
    ],
)
def test_folders_with_the_word_of_a_split_are_splits(train, test):
    assert read(under(train, test)) == {"train": set(CLASSES), "test": set(CLASSES)}


@pytest.mark.parametrize("name", ["val2017", "valid", "Validation", "dev-set", "my_val"])
def test_the_words_of_val(name):
    assert set(read(under("train", name))) == {"train", "val"}


def test_what_lies_beside_the_splits_is_not_used(caplog):
    paths = [*under("seg_train/seg_train", "seg_test/seg_test"), "seg_pred/seg_pred/0.png"]
    assert set(read_class_folders(sorted(paths), "root").splits.values()) == {"train", "test"}
    assert re.search("1 images outside the class folders", caplog.text)


@pytest.mark.parametrize("test", ["test/0.png", "test/test/0.png", "testing/0.png"])
def test_a_test_folder_without_classes_is_not_used(test, caplog):
    found = read_class_folders([*under("train"), test], "root")
    assert re.search("1 images outside the class folders", caplog.text)
    assert found.splits == {"train": "train"}


@pytest.mark.parametrize(
    "names",
    [
        ("test_tube", "lab_coat"),
        ("test_tube", "training_shoe"),
        ("trainers", "boots"),
        ("train", "car"),
        ("contest", "latest", "developer"),
    ],
)
def test_classes_with_such_words_are_classes(names):
    assert read([f"{name}/{i}.png" for name in names for i in (0, 1)]) == {"train": set(names)}


def test_nested_folders_of_their_own_are_classes():
    paths = [*under("test_tube", classes=("a", "b")), *under("lab_coat", classes=("c", "d"))]
    assert read(paths) == {"train": {"test_tube", "lab_coat"}}
    assert read(under("ant", "bee", classes=("images",))) == {"train": {"ant", "bee"}}
    assert read(under("ant/x/y", "bee/x/y", classes=("z",))) == {"train": {"ant", "bee"}}


AMBIGUOUS = {
    "folds": under("fold0", "fold1", "fold2"),
    "words of no split": under("learn", "exam"),
    "sites": under("site_a", "site_b"),
    "sites that lack a class": [*under("site_a"), *under("site_b", classes=CLASSES[:2])],
    "domains with a folder each": under("amazon/images", "dslr/images"),
    "folds that hold themselves": under("f0/f0", "f1/f1"),
    "splits below the classes": under("ant", "bee", classes=("train", "test")),
    "a folder beside train": under("train", "extra"),
    "other folders beside train": [*under("train"), "docs/0.png"],
    "folders beside a word": under("train_set", "more"),
    "classes with words and folders": under("test_tube", "training_shoe", "lab_coat"),
    "words without common folders": [
        *under("test_tube", classes=("a", "b")),
        *under("training_shoe", classes=("c", "d")),
    ],
    "a stray image": [*under("fold0", "fold1"), "fold0/x.png"],
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_two_readings_are_refused_and_both_named(case):
    paths = AMBIGUOUS[case]
    with pytest.raises(DataError) as error:
        read(paths)
    told = str(error.value)
    assert "may be" in told
    assert "class" in told
    assert "a folder train/" in told
    assert paths[0].split("/")[0] in told
    assert "\n" not in told


def test_what_the_refusal_advises_is_read():
    assert read(under("train/fold0", "train/fold1")) == {"train": {"fold0", "fold1"}}
    assert read(under("train/train", "train/car")) == {"train": {"train", "car"}}


@pytest.mark.parametrize("names", [("val", "valid"), ("eval", "test"), ("train_a", "train_b")])
def test_two_folders_of_one_split_are_refused(names):
    folders = [*names, "test_a"] if "train_a" in names else ["train", *names]
    with pytest.raises(DataError, match=f"{names[0]}/ and {names[1]}/ both name the split"):
        read(under(*folders))


@pytest.mark.parametrize(
    "names", [("train", "test"), ("training", "testing"), ("train_set", "test_set")]
)
def test_splits_without_class_folders_are_refused(names):
    with pytest.raises(DataError, match="no class folder"):
        read([f"{name}/{i}.png" for name in names for i in (0, 1)])
