"""Every layout on every storage gives the same images, labels and order; wrong ones are told."""

import dataclasses
import functools
import hashlib
import os
import pickle
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from lightship import storage
from lightship.data import table_cache
from lightship.data.manifest import Manifest
from lightship.data.manifest_table import check_table, open_table, write_table
from lightship.data.sample_decoder import decode_all
from lightship.data.sources import layouts, roots
from lightship.data.sources.split_names import splits_of_files
from lightship.errors import ConfigError, DataError
from tests.support import images, make_digits
from tests.support.images import CLASSES, Files, expected, little_set, put

FILES = little_set()


def inside(name: str, data: bytes) -> Callable[[str], str]:
    """A layout that is one file, whose URL is the root."""

    def build(url: str) -> str:
        return storage.join(put(url, {name: data}), name)

    return build


def chained(inner: str, top: str = "") -> Callable[[str], str]:
    def build(url: str) -> str:
        put(url, {"x.bin": images.zipped(FILES, top)})
        return f"zip://{inner}::{storage.join(url, 'x.bin')}"

    return build


def under(files: Files) -> Callable[[str], str]:
    return lambda url: put(url, files)


def renamed(**names: str) -> Files:
    """The class folders with other names for the splits."""
    return {f"{names[path.split('/')[0]]}/{path.partition('/')[2]}": d for path, d in FILES.items()}


JUNK = {
    "train/.DS_Store": b"x",
    "train/ant/Thumbs.db": b"x",
    "__MACOSX/train/ant/._000.png": b"x",
    ".git/ant/x.png": b"x",
    "README.md": b"x",
    "train/bee/notes.txt": b"x",
}
SHUFFLED = dict(sorted(FILES.items(), key=lambda item: hashlib.md5(item[0].encode()).digest()))

LAYOUTS: dict[str, Callable[[str], str]] = {
    "folders": under(FILES),
    "folders with junk": under({**FILES, **JUNK}),
    "folders with other split names": under(renamed(train="Train", val="validation", test="test")),
    "folders in a folder": under({f"a/b/{path}": data for path, data in FILES.items()}),
    "nested folders": under({p.replace("/0", "/deep/er/0"): d for p, d in FILES.items()}),
    "zip": inside("x.zip", images.zipped(SHUFFLED)),
    "zip with a top folder": inside("x.zip", images.zipped({**FILES, **JUNK}, "set-main/")),
    "zip chain": chained(""),
    "zip chain to a folder": chained("in/side", "in/side/"),
    "tar": inside("x.tar", images.tarred(SHUFFLED)),
    "tar with a top folder": inside("x", images.tarred({f"./t/{p}": d for p, d in FILES.items()})),
    "gzipped tar": inside("x.download", images.tarred(SHUFFLED, gzipped=True)),
    "tars of a split each": under(
        {f"{s}.tar": images.tarred({p: d for p, d in SHUFFLED.items() if p.startswith(s)})
         for s in ("train", "val", "test")}
    ),
    "shards, labels numbers": under(images.webdataset(FILES)),
    "shards, labels text": under(images.webdataset(FILES, labels="text")),
    "shards, labels json": under(images.webdataset(FILES, labels="json")),
    "gzipped shards": under(images.webdataset(FILES, gzipped=True)),
    "parquet of the Hub": under(images.parquet(FILES)),
    "parquet, binary and text": under(images.parquet(FILES, features=False, as_struct=False)),
}  # fmt: skip


@pytest.fixture(params=["local", "memory", "s3"])
def store(request, tmp_path) -> str:
    """An empty place on each kind of storage."""
    if request.param == "local":
        return str(tmp_path / "set")
    if request.param == "memory":
        return f"memory://{tmp_path.name}-{request.node.name}"
    return request.getfixturevalue("s3").url("set")


def assert_holds(manifests: dict[str, Manifest], truth: dict[str, list[tuple[str, np.ndarray]]]):
    assert sorted(manifests) == sorted(truth)
    for split, pairs in truth.items():
        manifest = manifests[split]
        assert manifest.class_names == list(CLASSES)
        assert [manifest.class_names[i] for i in manifest.label] == [name for name, _ in pairs]
        pixels, bad = decode_all(manifest)
        assert not bad.reasons
        np.testing.assert_array_equal(pixels, np.stack([image for _, image in pairs]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images_labels_and_order(store, layout):
    root = LAYOUTS[layout](store)
    manifests = layouts.scan(root)
    assert_holds(manifests, expected(FILES))
    url = storage.join(store, "kept.table")
    table_cache.upload(table_cache.store(lambda path: write_table(path, manifests)), url)
    kept = open_table(table_cache.fetch(table_cache.Table.at(url), check_table))
    root = next(iter(manifests.values())).root
    assert_holds({s: dataclasses.replace(m, root=root) for s, m in kept.items()}, expected(FILES))


def test_without_splits_all_is_train(store):
    files = {path.partition("/")[2]: data for path, data in little_set(("train",)).items()}
    truth = expected(little_set(("train",)))
    assert_holds(layouts.scan(put(store, files)), truth)
    tar = {f"all-{i}.tar": images.tarred({p: d for p, d in files.items() if p.startswith(name)})
           for i, name in enumerate(CLASSES)}  # fmt: skip
    assert_holds(layouts.scan(put(store + "-tar", tar)), truth)


@pytest.mark.parametrize("make", [images.cifar10, images.cifar100])
@pytest.mark.parametrize("form", ["unpacked", "packed", "tar", "zip"])
def test_cifar_archives(store, make, form):
    train, test = images.cifar_pixels(23), images.cifar_pixels(6, seed=1)
    files = make(train, test)
    if form == "unpacked":
        root = put(store, files)
    elif form == "zip":
        root = inside("c.zip", images.zipped(files))(store)
    else:
        root = inside("any-name", images.tarred(files, form == "packed"))(store)
    manifests = layouts.scan(root)
    truth = {
        split: [(CLASSES[i % 3], image) for i, image in enumerate(rows.transpose(0, 2, 3, 1))]
        for split, rows in (("train", train), ("test", test))
    }
    assert_holds(manifests, truth)


def test_cifar_pickled_by_python_3(tmp_path):
    pixels = images.cifar_pixels(6)
    files = images.cifar100(pixels, pixels)
    batch = {"fine_labels": [0, 1, 2, 0, 1, 2], "data": pixels.reshape(6, -1)}
    files["cifar-100-python/train"] = pickle.dumps(batch, protocol=4)
    manifest = layouts.scan(put(str(tmp_path), files))["train"]
    np.testing.assert_array_equal(decode_all(manifest)[0], pixels.transpose(0, 2, 3, 1))


class Attack:
    def __init__(self, reduced: tuple) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple:
        return self.reduced


@pytest.mark.parametrize("attack", ["os.system", "eval", "numpy", "codecs"])
def test_pickles_with_code_are_refused_and_the_code_does_not_run(tmp_path, attack):
    trace = tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w').close()"
    reduced, name = {
        "os.system": ((os.system, (f"touch {trace}",)), "system"),
        "eval": ((eval, (code,)), "eval"),
        "numpy": ((np.load, (str(trace),)), "load"),
        "codecs": ((__import__("_codecs").encode, ("x", "rot13")), "rot13"),
    }[attack]
    evil = pickle.dumps({b"data": Attack(reduced), b"labels": [0]}, protocol=2)
    if attack in ("os.system", "eval"):  # the attack is real: an ordinary unpickler falls for it
        pickle.loads(evil)
        assert trace.exists()
        trace.unlink()
    files = images.cifar10(images.cifar_pixels(10), images.cifar_pixels(2))
    files["cifar-10-batches-py/data_batch_3"] = evil
    with pytest.raises(DataError, match=name):
        layouts.scan(put(str(tmp_path / "set"), files))
    assert not trace.exists()


@pytest.mark.parametrize(
    "damage", ["cut", "labels", "shape", "range", "fractions", "no numbers", "not a pickle"]
)
def test_damaged_cifar_archives_are_refused(tmp_path, damage):
    pixels = images.cifar_pixels(6)
    files = images.cifar100(pixels, pixels)
    rows = pixels.reshape(6, -1)
    whole = files["cifar-100-python/train"]
    files["cifar-100-python/train"] = {
        "cut": whole[: len(whole) // 2],
        "labels": images.python2_pickle({b"fine_labels": [0] * 5, b"data": rows}),
        "shape": images.python2_pickle({b"fine_labels": [0] * 6, b"data": rows[:, :99]}),
        "range": images.python2_pickle({b"fine_labels": [0] * 5 + [3], b"data": rows}),
        "fractions": pickle.dumps({"fine_labels": [0.5] * 6, "data": rows}, protocol=4),
        "no numbers": pickle.dumps({"fine_labels": [None] * 6, "data": rows}, protocol=4),
        "not a pickle": b"hello",
    }[damage]
    with pytest.raises(DataError):
        layouts.scan(put(str(tmp_path / "set"), files))


# ---- unlabelled images -------------------------------------------------------------------------


FLAT = {path.replace("/", "-"): data for path, data in FILES.items()}


@pytest.mark.parametrize(
    "layout",
    {
        "flat": under(FLAT),
        "zip": inside("x.zip", images.zipped(FLAT)),
        **{name: LAYOUTS[name] for name in ("folders", "tar", "shards, labels json")},
    }.items(),
    ids=lambda item: item[0],
)
def test_scan_images_finds_every_image_anywhere(store, layout):
    manifest = layouts.scan_images(layout[1](store))
    pixels, _ = decode_all(manifest)
    assert {image.tobytes() for image in pixels} == {
        images.pixels_of(data).tobytes() for data in FILES.values()
    }
    assert len(manifest) == len(FILES)
    assert (manifest.label == -1).all()
    assert manifest.class_names == []


def test_scan_images_of_one_image_of_parquet_and_of_cifar(tmp_path):
    one = inside("a.png", FILES["train/ant/000.png"])(str(tmp_path / "one"))
    assert decode_all(layouts.scan_images(one))[0].shape == (1, 8, 8, 3)
    rows = {name: data for name, data in images.parquet(FILES).items() if "test" in name}
    assert len(layouts.scan_images(put(str(tmp_path / "pq"), rows))) == 12
    cifar = images.cifar10(images.cifar_pixels(10), images.cifar_pixels(3))
    manifest = layouts.scan_images(put(str(tmp_path / "c10"), cifar))
    np.testing.assert_array_equal(
        decode_all(manifest)[0][10:], images.cifar_pixels(3).transpose(0, 2, 3, 1)
    )


# ---- what is refused, and how it is told -------------------------------------------------------


def without(*prefixes: str) -> Files:
    return {path: data for path, data in FILES.items() if not path.startswith(prefixes)}


def shards(**members: bytes) -> bytes:
    return images.tarred({name.replace("__", "."): data for name, data in members.items()})


PNG = FILES["train/ant/000.png"]
REFUSED: dict[str, tuple[Files, tuple[str, ...]]] = {
    "no images": (
        {"train/a/x.txt": b"", "train/b/y.txt": b"", "z.md": b""},
        ("2 .txt files, 1 .md file", "class folders"),
    ),
    "one class missing in val": (
        without("val/bee"),
        ("val lacks bee; add images, or remove the class from all splits",),
    ),
    "other classes in test": (
        {**without("test/ant"), "test/dog/0.png": PNG},
        ("test lacks ant", "train lacks dog"),
    ),
    "many classes missing": (
        {**{f"train/c{i}/0.png": PNG for i in range(9)}, "val/c0/0.png": PNG},
        ("c1, c2, c3, c4, c5 and 3 more",),
    ),
    "a class folder without images": (
        {**FILES, "train/dog/readme.txt": b"", "val/dog/0.png": PNG},
        ("train/dog/", "1 .txt file"),
    ),
    "no class folders": (FLAT, ("no class folder", "ROOT/CLASS/IMAGE")),
    "no class folders in splits": (
        {"train/0.png": PNG, "test/1.png": PNG},
        ("no class folder",),
    ),
    "two folders for val": (
        {**FILES, **{p.replace("val/", "valid/"): d for p, d in FILES.items()}},
        ("val/", "valid/"),
    ),
    "images and tars": (
        {**FILES, "x.tar": images.tarred(FILES)},
        ("36 image files", "1 tar files"),
    ),
    "a shard of no split": (
        {"train-0.tar": images.tarred(FILES), "more.tar": images.tarred(FILES)},
        ("more.tar",),
    ),
    "no image in the tar": ({"x.tar": shards(a__txt=b"")}, ("no images", "a.txt")),
    "not a tar": ({"x.tar": b"no tar at all" * 99}, ("x.tar",)),
    "a cut tar": ({"x.tar": images.tarred(FILES)[:9000]}, ("x.tar", "not a whole tar")),
    "a cut gzip": ({"x.tgz": images.tarred(FILES, gzipped=True)[:3000]}, ("x.tgz",)),
    "a sample without a label": (
        {"x.tar": shards(a__png=PNG, a__cls=b"0", b__png=PNG)},
        ("x.tar", "sample b"),
    ),
    "a sample with two images": (
        {"x.tar": shards(a__png=PNG, a__jpg=PNG, a__cls=b"0")},
        ("two images", "sample a"),
    ),
    "a label out of range": (
        {"x.tar": shards(a__png=PNG, a__cls=b"3"), "classes.txt": b"ant\nbee\ncat\n"},
        ("such as 3", "0 to 2"),
    ),
    "a negative label": ({"x.tar": shards(a__png=PNG, a__cls=b"-1")}, ("such as -1",)),
    "a label that is not listed": (
        {"x.tar": shards(a__png=PNG, a__cls=b"dog"), "classes.json": b'["ant", "bee"]'},
        ("dog",),
    ),
    "labels of two kinds": (
        {"x.tar": shards(a__png=PNG, a__cls=b"dog", b__png=PNG, b__cls=b"1")},
        ("some labels are numbers",),
    ),
    "a list of classes that is none": (
        {"x.tar": shards(a__png=PNG, a__cls=b"0"), "classes.json": b'{"a": 0}'},
        ("classes.json",),
    ),
    "not Parquet": ({"train.parquet": b"PAR1 not really"}, ("train.parquet",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_words_that_help(tmp_path, case):
    files, words = REFUSED[case]
    with pytest.raises(DataError) as error:
        layouts.scan(put(str(tmp_path / "set"), files))
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def tars(**members: tuple[str, ...]) -> Files:
    """NAME.tar for each name, with images at these paths."""
    return {f"{name}.tar": images.tarred(dict.fromkeys(paths, PNG))
            for name, paths in members.items()}  # fmt: skip


@pytest.mark.parametrize(
    ("files", "words"),
    {
        "no class folders in val": (
            tars(train=("train/cat/1.png", "train/dog/1.png"), val=("val/1.png", "val/2.png")),
            ("val.tar", "no class folder", "val/1.png"),
        ),
        "folders in the classes": (
            tars(train=("cat/a/1.png", "cat/b/1.png", "dog/c/1.png"), test=("cat/1.png",)),
            ("test lacks dog",),
        ),
        "the same folders in the classes": (
            tars(train=("cat/a/1.png", "dog/a/1.png", "cat/b/1.png"), test=("cat/1.png",)),
            ("train.tar", "cat, dog hold the same folders"),
        ),
        "splits inside": (
            tars(train=tuple(f"set/{split}/cat/1.png" for split in ("train", "val", "test"))),
            ("train.tar", "the name says train", "set/test/ inside is test"),
        ),
        "another split inside": (
            tars(train=("train/cat/1.png",), test=("train/cat/2.png",)),
            ("test.tar", "the name says test", "train/ inside is train"),
        ),
        "another spelling": (
            tars(train=("cat/1.png", "dog/1.png"), test=("Cat/1.png", "dog/1.png")),
            ("test lacks cat", "train lacks Cat"),
        ),
        "no folder at all": (tars(train=("cat/1.png",), test=("1.png",)), ("no class folder",)),
    }.values(),
)
def test_tars_of_a_split_are_refused_as_their_folders_are(tmp_path, files, words):
    with pytest.raises(DataError) as error:
        layouts.scan(put(str(tmp_path), files))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "files",
    {
        "a class each": {
            f"{split}/{name}.tar": images.tarred({f"{name}/1.png": PNG})
            for split in ("train", "test") for name in ("cat", "dog")
        },
        "a part each, in a folder of its name": {
            f"{split}-{i}.tar": images.tarred(
                {f"{split}-{i}/{name}/1.png": PNG for name in ("cat", "dog")}
            )
            for split in ("train", "test") for i in range(2)
        },
        "folders in the classes": tars(
            train=("x/cat/a/1.png", "x/cat/b/1.png", "x/dog/c/1.png", "x/README.md"),
            test=("y/cat/1.png", "y/dog/1.png"),
        ),
    }.values(),
)  # fmt: skip
def test_the_class_is_the_upper_folder_in_tars_of_a_split(tmp_path, files):
    manifests = layouts.scan(put(str(tmp_path), files))
    assert set(manifests) == {"train", "test"}
    for manifest in manifests.values():
        names = [manifest.class_names[i] for i in manifest.label]
        assert manifest.class_names == ["cat", "dog"]
        assert sorted(set(names)) == ["cat", "dog"]


@pytest.mark.parametrize("form", ["local", "zip", "tar", "tar of a split"])
def test_an_empty_class_folder_is_refused(tmp_path, form):
    set_path = tmp_path / "set"
    put(str(set_path), FILES)
    (set_path / "train" / "dog").mkdir()
    root = str(set_path)
    if form == "zip":
        root = str(tmp_path / "x.zip")
        with zipfile.ZipFile(root, "w") as archive:
            for path in sorted(set_path.rglob("*")):
                archive.write(path, path.relative_to(set_path))
    elif form.startswith("tar"):
        name, what = ("x.tar", ".") if form == "tar" else ("train.tar", "train")
        (tmp_path / "tars").mkdir()
        root = str(tmp_path / "tars")
        subprocess.run(["tar", "cf", f"{root}/{name}", "-C", str(set_path), what], check=True)
    with pytest.raises(DataError, match="train/dog/ has no image"):
        layouts.scan(root)


@pytest.mark.parametrize("scan", [layouts.scan, layouts.scan_images])
def test_nothing_at_the_root(store, scan):
    with pytest.raises(DataError, match=r"--data\.root"):
        scan(storage.join(store, "nowhere"))


def test_one_file_of_an_unknown_kind_is_refused(tmp_path):
    root = inside("x.7z", b"7z\xbc\xaf\x27\x1c" * 99)(str(tmp_path))
    with pytest.raises(DataError, match=r"594 bytes and no tar, zip or Parquet"):
        layouts.scan(root)
    odd = inside("download", images.zipped(FILES))(str(tmp_path))
    with pytest.raises(DataError, match=f"zip://::{odd}"):
        layouts.scan(odd)
    with pytest.raises(DataError, match="not a whole zip"):
        layouts.scan(inside("x.zip", images.zipped(FILES)[:999])(str(tmp_path)))


def test_parquet_columns_that_do_not_fit(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root, path = str(tmp_path), tmp_path / "train.parquet"
    pq.write_table(pa.table({"picture": [b"x"], "label": [0]}), path)
    with pytest.raises(DataError, match=r"no column of image bytes.*picture .binary., label"):
        layouts.scan(root)
    pq.write_table(pa.table({"image": [b"x"], "kind": [0]}), path)
    with pytest.raises(
        DataError, match=r"no column label, fine_label, labels.*image .binary., kind"
    ):
        layouts.scan(root)
    pq.write_table(pa.table({"image": [b"x"], "label": [0.5]}), path)
    with pytest.raises(DataError, match="type double"):
        layouts.scan(root)


def test_unlabelled_test_split_is_left_out_and_told(tmp_path, caplog):
    import pyarrow as pa
    import pyarrow.parquet as pq

    put(str(tmp_path), {k: v for k, v in images.parquet(FILES).items() if "train" in k})
    pq.write_table(pa.table({"image": [PNG], "label": [-1]}), tmp_path / "data" / "test.parquet")
    assert list(layouts.scan(str(tmp_path))) == ["train"]
    assert re.search("split test has no labels", caplog.text)


def test_images_outside_the_class_folders_are_told(tmp_path, caplog):
    put(str(tmp_path), {**FILES, "docs/logo.png": PNG, "train/stray.png": PNG})
    assert_holds(layouts.scan(str(tmp_path)), expected(FILES))
    assert re.search("2 images outside the class folders", caplog.text)


def test_a_class_may_be_called_train(tmp_path):
    names = {"ant": "train", "bee": "car", "cat": "bus"}
    files = {f"{names[path.split('/')[1]]}/{path.split('/')[2]}": data
             for path, data in little_set(("train",)).items()}  # fmt: skip
    manifests = layouts.scan(put(str(tmp_path), files))
    assert list(manifests) == ["train"]
    assert manifests["train"].class_names == ["bus", "car", "train"]


def test_parquet_without_pyarrow_names_what_to_install(tmp_path):
    root = put(str(tmp_path / "set"), images.parquet(FILES))
    (tmp_path / "pyarrow.py").write_text("raise ImportError('not here')")
    code = (
        "from lightship.data.sources import layouts\n"
        "from lightship.errors import ConfigError\n"
        f"try: layouts.scan({root!r})\n"
        "except ConfigError as error: print(error)"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "which needs pyarrow: pip install pyarrow" in done.stdout


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("default/validation/0000.parquet", "val"),
        ("test/0000.parquet", "test"),
        ("imagenet1k_train_0001.tar", "train"),
        ("dev.tar", "val"),
        ("train/part-test-1.tar", "test"),
        ("contest/trained.tar", None),
        ("eval/0.tar", "test"),
        ("training-000.tar", "train"),
        ("data/TestSet.parquet", "test"),
        ("my-dev-area/sub/pets.parquet", None),
    ],
)
def test_the_split_a_shard_names(path, split):
    assert splits_of_files([path], "root") == (split and [split])


@pytest.mark.parametrize(
    ("paths", "splits"),
    [
        (["train_set/0.tar", "test_set/0.tar"], ["train", "test"]),
        (["x/train2017/0.tar", "x/val2017/0.tar"], ["train", "val"]),
        (["my-test-set/a.tar", "my-test-set/b.tar"], None),
        (["train-station-train-0.tar", "train-station-test-0.tar"], ["train", "test"]),
    ],
)
def test_the_splits_that_shards_name_together(paths, splits):
    assert splits_of_files(paths, "root") == splits


@pytest.mark.parametrize("folder", ["plain", "test", "my-dev-area", "run_val/sub"])
@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_parquet_file_trains_wherever_it_lies(tmp_path, folder, form):
    files = images.parquet(FILES)
    put(str(tmp_path / folder), {"pets.parquet": files[min(f for f in files if "train" in f)]})
    root = tmp_path / folder / ("pets.parquet" if form == "file" else "")
    assert list(layouts.scan(str(root))) == ["train"]


def test_a_shard_that_names_two_splits_is_refused():
    with pytest.raises(DataError, match=r"train_val\.tar names several splits"):
        splits_of_files(["train_val.tar", "test.tar"], "root")


# ---- named roots, MD5 sums ---------------------------------------------------------------------


def test_the_embedded_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    manifests = layouts.scan("digits")
    truth = load_digits()
    seen = 0
    for split, manifest in manifests.items():
        pixels, _ = decode_all(manifest)
        for i in range(len(manifest)):
            number = int(Path(manifest.name(i)).stem)
            scaled = np.rint(truth.images[number] * (255 / 16))
            grey = np.repeat(scaled[..., None], 3, axis=2)
            np.testing.assert_array_equal(pixels[i], grey)
            assert manifest.label[i] == truth.target[number]
            assert (split == "test") == (number % make_digits.TEST_EVERY == 0)
        seen += len(manifest)
    assert seen == len(truth.images) == 1797
    assert manifests["train"].class_names == list("0123456789")


def test_the_script_makes_the_embedded_zip_again(tmp_path):
    make_digits.write_zip(tmp_path / "digits.zip")
    again = zipfile.ZipFile(tmp_path / "digits.zip")
    embedded = zipfile.ZipFile(roots.resolve_root("digits").removeprefix("zip://::"))
    assert again.namelist() == embedded.namelist()
    for name in again.namelist():
        np.testing.assert_array_equal(
            images.pixels_of(again.read(name)), images.pixels_of(embedded.read(name))
        )


class Web:
    """A folder served over HTTP, and the paths that were asked for."""

    def __init__(self, folder: Path) -> None:
        asked: list[tuple[str, str]] = []

        class Handler(SimpleHTTPRequestHandler):
            def log_request(self, code: object = "-", size: object = "-") -> None:
                asked.append((self.command, self.path))

            def log_message(self, *args: object) -> None:
                pass

        self.asked = asked
        handler = functools.partial(Handler, directory=str(folder))
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def web(tmp_path, monkeypatch) -> Iterator[Web]:
    monkeypatch.setenv("LIGHTSHIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "web").mkdir()
    served = Web(tmp_path / "web")
    yield served
    served.server.shutdown()
    served.server.server_close()


ARCHIVES = {
    "cifar": images.tarred(
        images.cifar10(images.cifar_pixels(10), images.cifar_pixels(3)), gzipped=True
    ),
    "zip": images.zipped(FILES),
    "tar": images.tarred(FILES),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_with_an_md5_is_fetched_once_and_verified(web, tmp_path, kind):
    (tmp_path / "web" / "get").write_bytes(ARCHIVES[kind])
    md5 = hashlib.md5(ARCHIVES[kind]).hexdigest()
    root = f"{web.url}/get"
    first = layouts.scan(root, md5)
    assert [method for method, _ in web.asked].count("GET") == 1
    before = len(web.asked)
    again = layouts.scan(root, md5)
    assert len(web.asked) == before
    assert {s: m.fingerprint() for s, m in again.items()} == {
        s: m.fingerprint() for s, m in first.items()
    }
    assert first["train"].root == roots.resolve_root(root, md5)
    assert decode_all(first["train"])[0].shape[0] == len(first["train"])


def test_a_named_root_is_shorthand_for_an_address_and_its_md5(web, tmp_path, monkeypatch):
    (tmp_path / "web" / "c.tar.gz").write_bytes(ARCHIVES["cifar"])
    md5 = hashlib.md5(ARCHIVES["cifar"]).hexdigest()
    monkeypatch.setitem(roots.NAMED_ROOTS, "cifar10", (f"{web.url}/c.tar.gz", md5))
    named, spelled_out = layouts.scan("cifar10"), layouts.scan(f"{web.url}/c.tar.gz", md5)
    assert {s: m.fingerprint() for s, m in named.items()} == {
        s: m.fingerprint() for s, m in spelled_out.items()
    }
    np.testing.assert_array_equal(
        decode_all(named["test"])[0], images.cifar_pixels(3).transpose(0, 2, 3, 1)
    )


def test_a_wrong_md5_is_refused_and_nothing_is_kept(web, tmp_path):
    (tmp_path / "web" / "get").write_bytes(ARCHIVES["tar"])
    with pytest.raises(DataError, match="0" * 32):
        layouts.scan(f"{web.url}/get", "0" * 32)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_pyarrow_is_imported_only_for_parquet(tmp_path):
    root = put(str(tmp_path / "set"), FILES)
    code = (
        "import sys; from lightship.data import sample_decoder\n"
        "from lightship.data.sources import layouts\n"
        f"sample_decoder.decode_all(layouts.scan({root!r})['train'])\n"
        "assert not {'pyarrow', 'sklearn'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_credential_in_the_root_is_not_told(tmp_path):
    with pytest.raises((DataError, ConfigError)) as error:
        layouts.scan(f"{tmp_path}/nowhere?X-Amz-Signature=abc123")
    assert "abc123" not in str(error.value)
