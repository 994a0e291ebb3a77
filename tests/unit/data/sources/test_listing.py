"""What of a root is listed: nothing is left out unsaid, and no run's output becomes a class."""

import os
import random
import re
import socket
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightship import storage
from lightship.config import PackConfig
from lightship.data.sample_decoder import decode_all
from lightship.data.shards.index import INDEX
from lightship.data.shards.pack import pack
from lightship.data.sources import layouts, listing, roots
from lightship.data.sources.build_manifests import build_manifests
from lightship.data.sources.own_files import PREDICTION_COLUMNS
from lightship.errors import ConfigError, DataError
from lightship.predict.table import COLUMNS, Prediction, Table
from lightship.storage import file_table
from lightship.storage.s3_clients import S3fs
from tests.support import images, s3_listing
from tests.support.images import Files, little_set, put

FILES = little_set(("train", "test"), per_class=2)
FLAT = {path.partition("/")[2]: data for path, data in little_set(("train",)).items()}
PNG = FILES["train/ant/000.png"]
RUN: Files = {
    "config.yaml": b"run: {}", "DONE": b"{}", "checkpoints/attempt": b"00001",
    "logs/starts.json": b"[]", "report/x.png": PNG, "checkpoints/step-00000001.ckpt": b"x",
}  # fmt: skip


def below(folder: str, files: Files) -> Files:
    return {f"{folder}/{path}": data for path, data in files.items()}


def classes_and_sizes(root: str) -> dict[str, tuple[list[str], int]]:
    return {s: (m.class_names, len(m)) for s, m in layouts.scan(root).items()}


@pytest.mark.parametrize("suffix", [".HEIC", ".jxl", ".jpg_large", ".png.bak", ""])
@pytest.mark.parametrize("scan", [layouts.scan, layouts.scan_images])
def test_files_that_no_reader_takes_are_counted_by_suffix(tmp_path, suffix, scan, caplog):
    put(str(tmp_path), {**FLAT, **{f"cat/x{i}{suffix}": b"x" * 9 for i in range(7)}})
    last = suffix.rpartition(".")[2].lower()
    kind = f".{last}" if last else "extensionless"
    found = scan(str(tmp_path))
    assert re.search(f"not read: 7 {kind} files, such as cat/x0", caplog.text)
    assert len(caplog.messages) == 1
    manifest = found["train"] if isinstance(found, dict) else found
    assert manifest.not_read == f"7 {kind} files"
    assert len(manifest) == len(FLAT)


def test_a_small_other_kind_beside_shards_is_counted_too(tmp_path, caplog):
    files = {**images.webdataset(little_set(per_class=40)), "logo.png": b"x", "notes.md": b"x"}
    put(str(tmp_path), {**files, "classes.txt": b"ant\nbee\ncat\n"})
    layouts.scan(str(tmp_path))
    assert re.search(r"not read: 1 \.png file, 1 \.md file", caplog.text)


def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(tmp_path):
    put(str(tmp_path), FLAT)
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "cat" / "loop.png").symlink_to(tmp_path / "cat" / "loop.png")
    manifest = layouts.scan(str(tmp_path))["train"]
    assert len(manifest) == len(FLAT) + 2
    with pytest.raises((DataError, ConfigError, storage.NotFound), match=r"cat/(gone|loop)\.png"):
        decode_all(manifest)


def test_pipes_and_sockets_are_not_read_and_said(tmp_path, monkeypatch, caplog):
    put(str(tmp_path), FLAT)
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # a socket's path is short
        server.bind("cat/socket.png")
        manifest = layouts.scan(str(tmp_path))["train"]
        assert re.search(r"not read: 2 \.png files, such as cat/pipe\.png", caplog.text)
    assert len(manifest) == len(FLAT)


@pytest.mark.parametrize("form", ["local", "memory", "zip"])
@pytest.mark.parametrize("where", ["runs/1", "set-1a2b", "deep/er/runs/x"])
def test_the_output_of_a_run_is_no_class(tmp_path, form, where, caplog):
    files = {**FLAT, **below(where, RUN)}
    if form == "zip":
        (tmp_path / "x.zip").write_bytes(images.zipped(files))
        root = str(tmp_path / "x.zip")
    else:
        root = put(str(tmp_path) if form == "local" else f"memory://{tmp_path.name}{where}", files)
    assert classes_and_sizes(root) == {"train": (["ant", "bee", "cat"], len(FLAT))}
    assert re.search(rf"ignored: {where}/ \(output of a run\)", caplog.text)


@pytest.mark.parametrize("left", ["DONE", "checkpoints/attempt", "logs/starts.json"])
def test_a_run_is_known_by_any_of_its_marks(tmp_path, left, caplog):
    put(str(tmp_path), {**FILES, **below("runs/1", {"config.yaml": b"", left: b"", "x.png": PNG})})
    assert set(classes_and_sizes(str(tmp_path))) == {"train", "test"}
    assert re.search("output of a run", caplog.text)


def test_a_table_under_the_root_is_no_part_of_the_set(tmp_path, caplog):
    put(str(tmp_path), {**FLAT, "t.parquet": b"x" * 10**6, "t.parquet.parts/parts.json": b"{}"})
    manifest = layouts.scan_images(str(tmp_path), leave_out=[str(tmp_path / "t.parquet")])
    assert re.search(r"ignored: t\.parquet\.parts/", caplog.text)
    assert len(manifest) == len(FLAT)
    assert manifest.not_read == ""


def test_a_run_at_the_root_itself_is_no_class(tmp_path, caplog):
    files = {**FLAT, **RUN, "data/manifest-0123.npz": b"x", "predictions.csv": b"x"}
    put(str(tmp_path), files)
    assert classes_and_sizes(str(tmp_path)) == {"train": (["ant", "bee", "cat"], len(FLAT))}
    assert caplog.messages == [f"{tmp_path}: ignored: the output of a run at the root"]


@pytest.mark.parametrize(
    ("missing", "unread"),
    [
        ([], None),
        ([INDEX], "1 .md file"),
        ([INDEX, "classes.txt"], "1 .md file, 1 .json file, 1 .txt file"),
    ],
)
def test_files_of_a_pack_are_not_called_unread(tmp_path, missing, unread, caplog):
    """Unless nothing shows that they belong to a pack."""
    source = put(str(tmp_path / "from"), {**FILES, "train/ant/bad.png": b"x"})
    options = PackConfig(on_error="skip", max_bad_fraction=0.5)
    to = tmp_path / "to"
    pack(source, str(to), options, lambda done, total: None)
    put(str(to), {"notes.md": b"x"})
    assert (to / "skipped.txt").exists()
    for name in missing:
        (to / name).unlink()
    layouts.scan_images(str(to))
    line = f"{to}: not read: {unread}, such as notes.md"
    assert caplog.messages == ([line] if unread else [])


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_predictions_are_not_called_unread(tmp_path, ending, caplog):
    """Nor is a table of the user's taken for one."""
    assert PREDICTION_COLUMNS == COLUMNS
    files = little_set(("train",), size_px=(64, 64))
    put(str(tmp_path), {**files, f"other.{ending}": b"path,class\n"})
    with Table(tmp_path / "t", f"t.{ending}") as table:
        table.add([Prediction("ant/000.png", [("ant", 1.0)])])
    (tmp_path / "t").rename(tmp_path / f"t.{ending}")
    layouts.scan(str(tmp_path))
    line = f"{tmp_path}: not read: 1 .{ending} file, such as other.{ending}"
    assert caplog.messages == [line]


@pytest.mark.parametrize("line", ["5", "1.5", "null", "true", '"path"', "[]", "{}", "{", ""])
def test_any_json_may_lie_beside_the_images(tmp_path, line):
    put(str(tmp_path), {**FILES, "notes.jsonl": line.encode()})
    assert layouts.scan(str(tmp_path))["train"].not_read == "1 .jsonl file"


@pytest.mark.parametrize("line", ["", "\0", '"', '"a\n'])
def test_any_csv_may_lie_beside_the_images(tmp_path, line):
    put(str(tmp_path), {**FILES, "notes.csv": line.encode()})
    assert layouts.scan(str(tmp_path))["train"].not_read == "1 .csv file"


SYSTEM = [
    "lost+found",
    "$RECYCLE.BIN",
    "@eaDir",
    "__MACOSX",
    "ant/@eaDir",
    "System Volume Information",
]


@pytest.mark.parametrize("name", SYSTEM)
@pytest.mark.parametrize("form", ["local", "zip"])
def test_folders_of_the_system_are_ignored_and_said_once(tmp_path, name, form, caplog):
    files = {**FLAT, f"{name}/a/x.png": PNG, f"{name}/y.png": PNG}
    root = put(str(tmp_path / "set"), files)
    if form == "zip":
        root = str(tmp_path / "x.zip")
        Path(root).write_bytes(images.zipped(files))
    assert classes_and_sizes(root) == {"train": (["ant", "bee", "cat"], len(FLAT))}
    assert caplog.messages == [f"{root}: ignored: {name}/"]


def test_folders_of_the_system_are_not_entered(tmp_path, monkeypatch, caplog):
    put(str(tmp_path), {**FLAT, "lost+found/x.png": PNG, ".Trashes/x.png": PNG})
    entered = []
    scandir = os.scandir
    monkeypatch.setattr(
        os, "scandir", lambda path: entered.append(Path(path).name) or scandir(path)
    )
    layouts.scan(str(tmp_path))
    assert re.search(r"ignored: lost\+found/", caplog.text)
    assert "cat" in entered
    assert not {"lost+found", ".Trashes"} & set(entered), "they may not be readable"


# ---- names with `::`, zips of other systems ----------------------------------------------------


@pytest.mark.parametrize("name", ["data::v2", "s3::x", "a::b", "my set::1"])
@pytest.mark.parametrize("form", ["folder", "zip", "class"])
def test_a_local_name_may_hold_two_colons(tmp_path, monkeypatch, name, form):
    monkeypatch.chdir(tmp_path)
    root = name
    if form == "folder":
        put(str(tmp_path / "set"), FILES)
        (tmp_path / "set").rename(tmp_path / name)
    elif form == "zip":
        root = f"{name}/x.zip"
        (tmp_path / name).mkdir()
        (tmp_path / root).write_bytes(images.zipped(FILES))
    else:
        root = put("set", FILES)
        for split in ("train", "test"):
            (tmp_path / root / split / "cat").rename(tmp_path / root / split / name)
    manifests = layouts.scan(root)
    for manifest in manifests.values():
        assert len(decode_all(manifest)[0]) == 6
    assert (name in manifests["train"].class_names) == (form == "class")


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("s3://b/a::b/0.png", ("s3", "s3://b/a::b/0.png", None)),
        ("zip://a::b/0.png::s3://b/x.zip", ("zip", "zip://a::b/0.png", "s3://b/x.zip")),
        ("zip://a::b/0.png::/x.zip", ("zip", "zip://a::b/0.png", "/x.zip")),
        ("zip::zip://i.zip::s3://b/x.zip", ("zip", "zip://", "zip://i.zip::s3://b/x.zip")),
        ("simplecache::s3://b/x", ("simplecache", "simplecache://", "s3://b/x")),
        ("zip::x.zip", ("zip", "zip://", "x.zip")),
        ("zip://x", ("zip", "zip://x", None)),
    ],
)
def test_only_archives_and_urls_are_chained(url, parts):
    from lightship.storage.urls import split

    assert split(url) == parts


WINDOWS_NAMES = {
    "backslashes": lambda path: path.replace("/", "\\"),
    "a leading slash": lambda path: f"/{path}",
    "a dot": lambda path: f"./{path}",
    "a drive": lambda path: f"C:\\set\\{path}".replace("/", "\\"),
}


@pytest.mark.parametrize("form", WINDOWS_NAMES)
@pytest.mark.parametrize("system", [0, 3])
def test_zips_of_other_systems(tmp_path, form, system):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path, data in FILES.items():
            entry = zipfile.ZipInfo(WINDOWS_NAMES[form](path))
            entry.create_system = system
            archive.writestr(entry, data)
    manifests = layouts.scan(str(tmp_path / "x.zip"))
    assert set(manifests) == {"train", "test"}
    for manifest in manifests.values():
        assert manifest.class_names == ["ant", "bee", "cat"]
        assert len(decode_all(manifest)[0]) == 6


def test_a_backslash_in_a_name_stays_where_slashes_separate(tmp_path):
    files = {**FLAT, **{f"back\\slash/{i}.png": PNG for i in range(2)}}
    (tmp_path / "x.zip").write_bytes(images.zipped(files))
    manifest = layouts.scan(str(tmp_path / "x.zip"))["train"]
    assert "back\\slash" in manifest.class_names
    assert len(decode_all(manifest)[0]) == len(files)


# ---- named roots, lists of classes -------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_a_folder_named_as_a_known_set_is_said(tmp_path, monkeypatch, name, caplog):
    monkeypatch.chdir(tmp_path)
    known = inside_zip(tmp_path / "known.zip")
    monkeypatch.setitem(roots.NAMED_ROOTS, "cifar10", known)
    put(f"./{name}", FILES)
    assert len(layouts.scan(name)["train"]) != 6
    assert re.search(rf"{name} is the data set of that name.* give \./{name}", caplog.text)
    assert len(layouts.scan(f"./{name}")["train"]) == 6


def inside_zip(path: Path) -> tuple[str, None]:
    path.write_bytes(images.zipped(FLAT))
    return str(path), None


def shard_with(classes: bytes, name: str = "classes.txt") -> Files:
    shard = images.tarred(
        {f"{i}.{e}": d for i in range(3) for e, d in (("png", PNG), ("cls", b"%d" % i))}
    )
    return {"x.tar": shard, name: classes}


@pytest.mark.parametrize(
    "raw",
    [
        b"\xef\xbb\xbfant\nbee\ncat\n",
        "ant\r\nbee\r\ncat\r\n\r\n".encode("utf-16"),
        b"ant\nbee\ncat\n\n\n",
        b" ant\nbee \ncat",
    ],
)
def test_a_list_of_classes_is_read_whatever_wrote_it(tmp_path, raw):
    put(str(tmp_path), shard_with(raw))
    assert layouts.scan(str(tmp_path))["train"].class_names == ["ant", "bee", "cat"]


def test_a_json_list_of_classes_may_begin_with_a_mark(tmp_path):
    put(str(tmp_path), shard_with(b'\xef\xbb\xbf["ant", "bee", "cat"]', "classes.json"))
    assert layouts.scan(str(tmp_path))["train"].class_names == ["ant", "bee", "cat"]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"ant\n\nbee\ncat\n", r"line 2 of classes\.txt is empty"),
        (b"\nant\nbee\n", r"line 1 of classes\.txt is empty"),
        (b"", r"line 1 of classes\.txt is empty"),
        (b"ant\nbee\nant\n", r"classes\.txt: .* 0 and 2 are both named 'ant'"),
        (b"ant\ncaf\xe9\ncat\n", r"classes\.txt is not UTF-8"),
    ],
)
def test_a_list_of_classes_that_would_shift_labels_is_refused(tmp_path, raw, words):
    put(str(tmp_path), shard_with(raw))
    with pytest.raises(DataError, match=words):
        layouts.scan(str(tmp_path))


def test_a_large_listing_becomes_a_manifest_in_few_bytes_a_file(monkeypatch) -> None:
    """Names of 33 bytes, about 40 more, and 3 MB; as objects of Python 300."""
    count = 100_000
    monkeypatch.setenv("LIGHTSHIP_S3_CLIENT", "s3fs")
    monkeypatch.setattr(S3fs, "answers", s3_listing.answers(s3_listing.CLASSES))
    listing.list_root(s3_listing.URL, "set")  # imports what it needs
    monkeypatch.setattr(S3fs, "answers", s3_listing.answers(count))
    tracemalloc.start()
    try:
        listed = listing.list_root(s3_listing.URL, "set")
        found = layouts._find(s3_listing.URL, "set", listed, labelled=True)
        train = build_manifests(found, s3_listing.URL, "set")["train"]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(train), len(train.class_names)) == (count, s3_listing.CLASSES)
    assert train.files[-1] == f"train/n{s3_listing.CLASSES - 1:08d}/{count - 1:012d}.JPEG"
    assert train.label.tolist() == sorted(train.label.tolist())
    assert peak_bytes < 160 * count


def test_an_object_that_would_be_read_as_another_is_left_out_and_said(monkeypatch, caplog) -> None:
    """`set//cat/0.png` would be `set/cat/0.png`, which is another object, or none."""
    keys = ["set/cat/0.png", "set/dog/0.png", "set//cat/0.png", "set//cat/1.png", "set//.x/1.png"]

    def answers(self: S3fs, deadline: object, **where: str) -> Iterator[dict[str, Any]]:
        yield {"Contents": [{"Key": key, "Size": 9} for key in sorted(keys)]}

    monkeypatch.setenv("LIGHTSHIP_S3_CLIENT", "s3fs")
    monkeypatch.setattr(S3fs, "answers", answers)
    train = layouts.scan("s3://bucket/set")["train"]
    assert list(train.files) == ["cat/0.png", "dog/0.png"]
    assert train.not_read == "2 .png files"
    assert "not read: 2 .png files, such as /cat/0.png" in caplog.text
    del keys[:2]
    with pytest.raises(DataError, match=r"set: all names begin or end with a slash \(/\.x/1"):
        layouts.scan("s3://bucket/set")


def untidy() -> Files:
    """Two splits below a folder, among files of many kinds, of a run and of systems."""
    rng, names = random.Random(0), ["a", "a-b", "a b", COMPOSED, DECOMPOSED, "\U0001f600", "\uffee"]
    suffixes = [".png", ".JPEG", ".webp", ".txt", ".json", ".HEIC", "", ".tar.gz.bak"]
    files = {
        f"set/{split}/{name}/{rng.choice(['', 'part-1/', 'part/'])}{rng.randrange(10**6)}"
        f"{rng.choice(suffixes)}": rng.randbytes(rng.randrange(1, 30))
        for split in ("seg_train", "seg_test")
        for name in names
        for _ in range(120)
    }
    beside = [
        "set/seg_train/loose.png", "set/notes.md", ".hidden/0.png", "set/seg_train/a/Thumbs.db",
        "set/@eaDir/0.png", "set/seg_test/a b/a..b.png",
    ]  # fmt: skip
    return {**files, **dict.fromkeys(beside, b"x"), **below("set/runs/1", RUN)}


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
BEFORE = {
    False: [
        "e4902ade82c9f98c494bc11af187e301",
        "51b35f4b51270afd7d2b20df0a341e82",
        "4ba977a84b9191a6a950c2db23dac07f",
    ],
    True: [
        "a85ceefaf1d8d9b1aa1e06edf43ac692",
        "bba4c69435c9c32b97bd73ad564fb961",
        "4374117635df21d47b45bf126ed636a0",
    ],
}
"""Whether checksums are known -> fingerprints of train, test and all images, as they were when a
listing was a list of objects.
"""


@pytest.mark.parametrize("form", ["local", "memory", "zip"])
@pytest.mark.parametrize("block", [8192, 8])
def test_an_untidy_listing_gives_what_it_gave_before(tmp_path, monkeypatch, caplog, form, block):
    monkeypatch.setattr(file_table, "_BLOCK", block)
    monkeypatch.setattr(file_table, "_SAMPLED", block // 8)
    files = untidy()
    if form == "zip":
        (tmp_path / "x.zip").write_bytes(images.zipped(files))
        root = str(tmp_path / "x.zip")
    else:
        root = put(str(tmp_path) if form == "local" else f"memory://{tmp_path.name}{block}", files)
    manifests = {**layouts.scan(root), "all": layouts.scan_images(root)}
    assert {split: len(m) for split, m in manifests.items()} == {
        "train": 331, "test": 309, "all": 641,
    }  # fmt: skip
    assert [m.fingerprint() for m in manifests.values()] == BEFORE[form == "zip"]
    assert manifests["train"].class_names == ["a", "a b", "a-b", COMPOSED, "\uffee", "\U0001f600"]
    unread = (
        "227 extensionless files, 226 .txt files, 208 .heic files, 200 .json files, "
        "180 .bak files, 1 of 1 other kinds"
    )
    assert {m.not_read for m in manifests.values()} == {unread}
    line = f"{root}: not read: {unread}, such as set/notes.md; "
    line += "ignored: set/@eaDir/, set/runs/1/ (output of a run)"
    outside = "1 images outside the class folders are not used, such as set/seg_train/loose.png"
    assert caplog.messages == [f"{root}: {outside}", line, line]
