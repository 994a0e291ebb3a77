"""Packing: the shards' bytes, where they are cut, what is recoded, refused and left out."""

import json
import os
import shutil
import subprocess
import tarfile
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship import cli, storage, versions
from lightship.config import PackConfig
from lightship.data import sample_reader
from lightship.data.manifest import Manifest
from lightship.data.sample_decoder import decode_all
from lightship.data.shards.index import INDEX, WORK, ShardWriter, sample_bytes, shard_sizes
from lightship.data.shards.pack import pack
from lightship.data.shards.plan import Plan, Shard
from lightship.data.sources import layouts
from lightship.errors import ConfigError, DataError
from tests.support import images
from tests.support.images import Files, little_set, pixels_of, put

FILES = little_set(("train", "test"), per_class=6, size_px=(48, 64))
SHARD_MIB = 0.03


@pytest.fixture(autouse=True)
def lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lightship")


def packed(source: str, destination: str, **options) -> None:
    options = {"shard_mib": SHARD_MIB, **options}
    pack(source, destination, PackConfig(**options), lambda done, total: None)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return put(str(tmp_path / "from"), FILES)


def all_but_the_index(monkeypatch, source: str, destination: str, **options) -> None:
    """A pack that fails when all shards are written and recorded."""

    def fail(*args: object) -> None:
        raise ConfigError("no index today")

    with monkeypatch.context() as fault:
        fault.setattr("lightship.data.shards.pack.write_table", fail)
        with pytest.raises(ConfigError, match="no index today"):
            packed(source, destination, **options)


def tree(root: str) -> dict[str, bytes]:
    """Every file under a root, hidden ones too."""
    paths = [path for path in Path(root).rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def table(files: list[str], lengths: list[int]) -> Manifest:
    """A manifest of whole files whose bytes do not exist."""
    count = len(lengths)
    zeros = np.zeros(count, dtype=np.int64)
    return Manifest(
        root="",
        files=files,
        file_index=zeros.astype(np.int32),
        offset=zeros.copy(),
        length=np.array(lengths, dtype=np.int64),
        label=np.arange(count) % 3,
        crc32=zeros - 1,
        class_names=["a", "b", "c"],
        container="bytes",
        encoding="image",
    )


# ---- the bytes of a shard ----------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[1], [511, 512, 513], [0, 4000], [7000, 300, 1024] * 9])
def test_a_shard_is_a_whole_tar_and_its_size_follows_from_the_index(
    tmp_path: Path, lengths: list[int]
) -> None:
    rng = np.random.default_rng(0)
    contents = [rng.bytes(length) for length in lengths]
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        tar = ShardWriter(file)
        offsets = [tar.add(f"{i:09d}", i, data, "jpg") for i, data in enumerate(contents)]
        size = tar.close()
    whole = path.read_bytes()
    assert len(whole) == size
    for offset, data in zip(offsets, contents, strict=True):
        assert whole[offset : offset + len(data)] == data
    with tarfile.open(path) as read_back:
        members = {m.name: read_back.extractfile(m).read() for m in read_back}
    assert members == {
        name: value
        for i, data in enumerate(contents)
        for name, value in ((f"{i:09d}.cls", str(i).encode()), (f"{i:09d}.jpg", data))
    }
    listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == list(members)
    manifest = table(["x.tar"], lengths)
    manifest.offset[:] = offsets
    assert shard_sizes(manifest) == {"x.tar": size}
    assert sum(sample_bytes(manifest.length)) <= size < sum(sample_bytes(manifest.length)) + 11_264


@given(
    st.lists(st.integers(0, 5000), min_size=1, max_size=60),
    st.floats(0.001, 0.1),
    st.floats(0.1, 2),
)
def test_a_split_is_cut_where_a_shard_is_full(
    lengths: list[int], shard_mib: float, growth: float
) -> None:
    manifest = table([f"{i}" for i in range(len(lengths))], lengths)
    plan = Plan("", {}, shard_mib, None, None, {"train": growth})
    shards = plan.shards({"train": manifest})
    stored = sample_bytes((manifest.length * growth).astype(np.int64))
    assert [shard.number for shard in shards] == list(range(len(shards)))
    ids = [i for shard in shards for i in range(shard.start, shard.stop)]
    assert ids == list(range(len(lengths)))
    bound = round(shard_mib * 2**20)
    for shard in shards:
        size = stored[shard.start : shard.stop].sum()
        assert size - stored[shard.stop - 1] < bound + stored.max(), "no shard is far too large"
    assert len(shards) <= 1 + stored.sum() // bound


def test_any_number_of_threads_writes_the_same_bytes(tmp_path: Path, folder: str) -> None:
    trees = []
    for threads in (1, 5):
        root = str(tmp_path / f"to-{threads}")
        packed(folder, root, threads=threads, quality=70)
        trees.append(tree(root))
    assert trees[0] == trees[1]
    assert len([file for file in trees[0] if file.endswith(".tar")]) > 5


def test_several_shards_are_written_at_once(tmp_path: Path, folder: str, monkeypatch) -> None:
    together, write = threading.Barrier(3), storage.write_file

    def meet(url: str, path: Path) -> None:
        if url.endswith(".tar"):
            together.wait(timeout=60)  # breaks, and so fails, unless three are here at once
        write(url, path)

    monkeypatch.setattr(storage, "write_file", meet)
    packed(folder, str(tmp_path / "to"), threads=3, shard_mib=0.0625)
    assert len(list((tmp_path / "to").rglob("*.tar"))) == 6


def test_a_gzipped_file_is_unpacked_once(tmp_path: Path, monkeypatch) -> None:
    root = storage.join(put(str(tmp_path), {"x.tgz": images.tarred(FILES, gzipped=True)}), "x.tgz")
    opened, unpack = [], sample_reader.Unpacked.__init__

    def spy(self, url: str) -> None:
        opened.append(url)
        unpack(self, url)

    monkeypatch.setattr(sample_reader.Unpacked, "__init__", spy)
    packed(root, str(tmp_path / "to"), threads=4)
    assert len(list((tmp_path / "to" / "train").glob("*.tar"))) > 1
    assert opened == [root, root], "once for each split"


# ---- scaling ----------------------------------------------------------------------------------


def test_training_meets_the_same_pixels_as_without_packing(tmp_path: Path, folder: str) -> None:
    packed(folder, str(tmp_path / "to"), short_side_px=24)
    manifest = layouts.scan(str(tmp_path / "to"))["train"]
    assert all(storage.base_name(file).endswith(".tar") for file in manifest.files)
    sizes = {pixels_of(data).shape for _, data in sample_reader.read_samples(manifest, range(18))}
    assert sizes == {(24, 32, 3)}
    np.testing.assert_array_equal(
        decode_all(manifest, image_size_px=24)[0],
        decode_all(layouts.scan(folder)["train"], image_size_px=24)[0],
    )


def test_shards_are_full_after_scaling_not_before(tmp_path: Path) -> None:
    """Images shrink to a tenth: cut by their old sizes, shards would be far too small."""
    files = little_set(("train",), per_class=60, size_px=(96, 96))
    packed(
        put(str(tmp_path / "from"), files), str(tmp_path / "to"), short_side_px=24, shard_mib=0.2
    )
    sizes = [path.stat().st_size for path in sorted((tmp_path / "to" / "train").iterdir())]
    assert len(sizes) > 2
    for size in sizes[:-1]:
        assert size == pytest.approx(0.2 * 2**20, rel=0.15)


# ---- bad images --------------------------------------------------------------------------------


def spoiled() -> Files:
    """Of 18 images of train two are bad; of those of test one would be if it were decoded."""
    bad = {"train/ant/001.png": b"", "train/cat/003.png": b"<html>no image</html>"}
    return {**FILES, **bad, "test/bee/002.png": FILES["test/bee/002.png"][:60]}


def test_a_bad_image_stops_the_pack_and_is_named(tmp_path: Path, capsys) -> None:
    root = put(str(tmp_path / "from"), {**FILES, "train/cat/003.png": b"<html>" * 999})
    to, options = tmp_path / "to", ["--shard_mib=0.03", "--threads=1"]
    assert cli.main(["pack", root, str(to), *options]) == 65
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("lightship: train/cat/003.png: no image (5994 bytes")
    assert "--on_error skip" in line
    with pytest.raises(DataError, match="is an unfinished pack"):
        layouts.scan(str(to))
    finished = {path: path.stat().st_mtime_ns for path in to.rglob("*.tar")}
    assert len(finished) > 1
    options += ["--on_error=skip", "--max_bad_fraction=0.1"]
    assert cli.main(["pack", root, str(to), *options]) == 0, "goes on from there"
    assert len(layouts.scan(str(to))["train"]) == 17
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_bad_images_are_left_out_counted_and_listed(tmp_path: Path, capsys) -> None:
    root, to = put(str(tmp_path / "from"), spoiled()), str(tmp_path / "to")
    options = ["--shard_mib=0.03", "--on_error=skip", "--max_bad_fraction=0.2"]
    assert cli.main(["pack", root, to, *options]) == 0
    assert "2 could not be read and are listed in skipped.txt" in capsys.readouterr().err
    listed = (tmp_path / "to" / "skipped.txt").read_text().splitlines()
    assert [line.split(":")[0].split()[0] for line in listed] == [
        "train/ant/001.png", "train/cat/003.png",
    ]  # fmt: skip
    before, after = layouts.scan(root), layouts.scan(to)
    good = [i for i in range(18) if before["train"].name(i) not in spoiled_names()]
    assert [data for _, data in sample_reader.read_samples(after["train"], range(16))] == [
        data for _, data in sample_reader.read_samples(before["train"], good)
    ]
    np.testing.assert_array_equal(after["train"].label, before["train"].label[good])
    keys = []
    for path in sorted(Path(to).glob("train/*.tar")):
        with tarfile.open(path) as tar:
            keys += [name.split(".")[0] for name in tar.getnames()]
    assert keys == [f"{i:09d}" for i in good for _ in range(2)], "keys are positions in the source"
    assert len(after["test"]) == 18, "what is copied is not decoded"


def spoiled_names() -> set[str]:
    return {path for path, data in spoiled().items() if data != FILES[path] and "train" in path}


def test_what_is_decoded_is_judged_by_its_pixels(tmp_path: Path) -> None:
    root, to = put(str(tmp_path / "from"), spoiled()), str(tmp_path / "to")
    packed(root, to, on_error="skip", max_bad_fraction=0.2, quality=80)
    assert len(layouts.scan(to)["test"]) == 17
    assert "test/bee/002.png" in (tmp_path / "to" / "skipped.txt").read_text()


def test_files_that_no_reader_takes_are_counted(tmp_path: Path, capsys) -> None:
    root = put(str(tmp_path / "from"), {**FILES, "train/cat/x.heic": b"x"})
    assert cli.main(["pack", root, str(tmp_path / "to")]) == 0
    assert "not read: 1 .heic file" in capsys.readouterr().err


def test_the_bound_of_an_images_size(tmp_path: Path, folder: str, capsys) -> None:
    flags = ["pack", folder, str(tmp_path / "to"), "--short_side_px=8"]
    assert cli.main([*flags, "--max_image_pixels=1000"]) == 65
    assert "--max_image_pixels" in capsys.readouterr().err
    assert cli.main([*flags, "--max_image_pixels=10000"]) == 0


@pytest.mark.parametrize("fraction", ["0.1", "0"])
def test_too_many_bad_images(tmp_path: Path, capsys, fraction: str) -> None:
    root = put(str(tmp_path / "from"), spoiled())
    options = ["--on_error=skip", f"--max_bad_fraction={fraction}"]
    assert cli.main(["pack", root, str(tmp_path / "to"), *options]) == 65
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"more than --max_bad_fraction {fraction} allows" in line
    assert "of 18 images are bad" in line


def test_a_split_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    files = {**FILES, **{path: b"" for path in FILES if path.startswith("test")}}
    with pytest.raises(DataError, match="none of 18 images"):
        packed(put(str(tmp_path / "from"), files), str(tmp_path / "to"), on_error="skip",
               max_bad_fraction=1)  # fmt: skip


def test_a_shard_of_bad_images_alone_is_no_shard(tmp_path: Path) -> None:
    files = {path: b"<html>" * 1600 if "train/bee" in path else d for path, d in FILES.items()}
    to = str(tmp_path / "to")
    packed(put(str(tmp_path / "from"), files), to, on_error="skip", max_bad_fraction=0.5)
    manifest = layouts.scan(to)["train"]
    assert len(manifest) == 12
    assert set(manifest.label) == {0, 2}
    assert manifest.class_names == ["ant", "bee", "cat"]
    assert manifest.files == sorted(f"train/{p.name}" for p in Path(to).glob("train/*"))
    numbers = [int(file[-9:-4]) for file in manifest.files]
    assert numbers != list(range(len(numbers))), "a number is missing"


def test_images_left_out_by_an_earlier_start_are_bad_for_the_next_one_too(
    tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    root, to = put(str(tmp_path / "from"), spoiled()), str(tmp_path / "to")
    all_but_the_index(monkeypatch, root, to, on_error="skip", max_bad_fraction=0.2)
    with pytest.raises(DataError, match=r"train/ant/001\.png.*--on_error skip"):
        packed(root, to)
    with pytest.raises(DataError, match=r"at least \d of 18 images are bad"):
        packed(root, to, on_error="skip", max_bad_fraction=0.05)
    packed(root, to, on_error="skip", max_bad_fraction=0.2)
    assert "2 could not be read" in caplog.messages[-1]


def test_a_repaired_image_is_listed_no_more(tmp_path: Path) -> None:
    path, to = "train/bee/002.png", tmp_path / "to"
    broken = b"<html>".ljust(len(FILES[path]))  # of the same size: the same source, to a listing
    root = put(str(tmp_path / "from"), {**FILES, path: broken})
    options = {"on_error": "skip", "max_bad_fraction": 0.1}
    packed(root, str(to), **options)
    assert (to / "skipped.txt").exists()
    put(root, {path: FILES[path]})
    (to / INDEX).unlink()
    packed(root, str(to), **options)
    assert not (to / "skipped.txt").exists()
    assert len(layouts.scan(str(to))["train"]) == 18


# ---- wrong input, and the same command again ---------------------------------------------------


def test_packed_already(tmp_path: Path, folder: str, capsys) -> None:
    command = ["pack", folder, str(tmp_path / "to"), "--shard_mib=0.03"]
    assert cli.main(command) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "to").rglob("*")}
    capsys.readouterr()
    assert cli.main(command) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert "already packed: 36 images in" in line
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "to").rglob("*")} == before


def change_source(path: Path, folder: str) -> list[str]:
    put(folder, {"train/ant/extra.png": FILES["train/ant/000.png"]})
    return []


def other_source(path: Path, folder: str) -> list[str]:
    return [put(str(path / "other"), little_set(("train",)))]


CHANGED = {
    "quality": (lambda path, folder: ["--quality=80"], "--quality was None, now 80"),
    "size": (lambda path, folder: ["--short_side_px=9"], "--short_side_px was None, now 9"),
    "shards": (lambda path, folder: ["--shard_mib=0.5"], "--shard_mib was 0.03, now 0.5"),
    "files": (change_source, "whose files have changed"),
    "source": (other_source, "/other"),
}


def test_folders_that_a_kill_in_the_removal_left_empty_are_removed(
    tmp_path: Path, folder: str
) -> None:
    command = ["pack", folder, str(tmp_path / "to"), "--shard_mib=0.03"]
    assert cli.main(command) == 0
    before = tree(str(tmp_path / "to"))
    for left in ("train", "scratch-abcdefgh"):
        (tmp_path / "to" / WORK / left).mkdir(parents=True)
    assert cli.main(command) == 0
    assert not (tmp_path / "to" / WORK).exists()
    assert tree(str(tmp_path / "to")) == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("case", CHANGED)
def test_another_source_or_other_options_are_refused(
    tmp_path: Path, folder: str, capsys, monkeypatch, case: str, finished: bool
) -> None:
    to = str(tmp_path / "to")
    if finished:
        packed(folder, to)
    else:
        all_but_the_index(monkeypatch, folder, to)
    before = tree(to)
    change, words = CHANGED[case]
    more = change(tmp_path, folder)
    source = more.pop() if case == "source" else folder
    assert cli.main(["pack", source, to, "--shard_mib=0.03", *more]) == 78
    [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("lightship: ")]
    assert words in line
    assert to in line
    assert tree(to) == before


def test_the_same_source_by_another_name_is_the_same(
    tmp_path: Path, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    packed(folder, str(tmp_path / "to"))
    os.rename(folder, tmp_path / "moved")
    packed(str(tmp_path / "moved"), str(tmp_path / "to"))
    assert "already packed" in caplog.messages[-1]


WRONG = [
    (["pack"], 2, "SRC, DST missing"),
    (["pack", "digits"], 2, "DST missing"),
    (["pack", "digits", "b", "c"], 2, "unknown argument c"),
    (["pack", "digits", "b", "--qualty=3"], 2, "unknown flag --qualty; did you mean --quality?"),
    (["pack", "digits", "b", "--quality=best"], 2, "--quality is 'best'; it must be a whole"),
    (["pack", "digits", "b", "--on_error=no"], 2, "it must be one of raise, skip"),
    (["pack", "digits", "b", "--quality=101"], 78, "--quality is 101; it must be at least 1"),
    (["pack", "digits", "b", "--short_side_px=0"], 78, "--short_side_px is 0; it must be"),
    (["pack", "digits", "b", "--shard_mib=0"], 78, "--shard_mib is 0.0; it must be at least 0.001"),
    (["pack", "digits", "b", "--threads=-1"], 78, "--threads is -1; it must be at least 0"),
    (["pack", "DESK/nowhere", "DESK/to"], 65, "SRC DESK/nowhere: nothing is there"),
    (["pack", "DESK/from", "DESK/from"], 78, "lies in SRC"),
    (["pack", "DESK/from", "DESK/from/shards/1"], 78, "lies in SRC"),
    (["pack", "DESK/from", "DESK/../DESK/from/x"], 78, "lies in SRC"),
    (["pack", "memory://from", "memory://from/x"], 78, "lies in SRC"),
    (["pack", "DESK/from/train", "DESK/from"], 78, "files that are no pack, such as test/ant/"),
    (["pack", "DESK/from", "DESK/file"], 78, "DST DESK/file is a file"),
    (["pack", "DESK/from", "https://127.0.0.1:9/x"], 74, "127.0.0.1:9"),
    (["pack", "DESK/from", "zip://::DESK/x.zip"], 78, "are only read"),
    (["pack", "DESK/from", "/proc/nowhere"], 78, "DST /proc/nowhere cannot be written"),
    (["pack", "DESK/from", "nosuch://b/x"], 78, "is no known storage"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "words"), WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_wrong_input_is_told_in_a_line(
    tmp_path: Path, folder: str, capsys, monkeypatch, arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "1")
    put(str(tmp_path), {"file": b"x", "x.zip": images.zipped({})})
    for path, data in FILES.items():
        storage.write_bytes(f"memory://from/{path}", data)
    desk = str(tmp_path)
    got = cli.main([item.replace("DESK/../DESK", f"{desk}/../{tmp_path.name}").replace("DESK", desk)
                    for item in arguments])  # fmt: skip
    printed = capsys.readouterr().err
    errors = [line for line in printed.splitlines() if line.startswith("lightship: ")]
    assert (got, len(errors)) == (code, 1), printed
    assert words.replace("DESK", desk) in errors[0]
    assert "--data.root" not in errors[0]
    assert not list(tmp_path.glob("to/*")), "nothing is left behind"
    assert "Traceback" not in printed


def test_a_bucket_that_may_not_be_written_is_told_before_anything_is_read(
    tmp_path: Path, s3, monkeypatch
) -> None:
    for name, value in s3.environment("reader").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"DST s3://.* cannot be written: .*denied"):
        packed(str(tmp_path / "nowhere"), s3.url("to"))


def test_a_class_name_that_is_no_line(tmp_path: Path) -> None:
    files = {f"train/{name}/0.png": FILES["train/ant/000.png"] for name in ("a", "b\nc")}
    with pytest.raises(DataError, match=r"'b\\nc' cannot be a line of classes\.txt"):
        packed(put(str(tmp_path / "from"), files), str(tmp_path / "to"))


@pytest.mark.parametrize(
    "damage",
    [
        "{", "", "[]", "null", "[" * 100_000, "{}", {"shard_mib": "1"}, {"shard_mib": 0},
        {"growth": {}}, {"growth": {"train": None}}, {"growth": []}, {"quality": [90]},
        {"unknown": 1},
    ],
    ids=lambda damage: str(damage)[:20],
)  # fmt: skip
def test_a_damaged_plan(tmp_path: Path, folder: str, damage: str | dict) -> None:
    packed(folder, str(tmp_path / "to"))
    plan = tmp_path / "to" / "pack.json"
    if isinstance(damage, dict):
        damage = json.dumps({**json.loads(plan.read_text()), **damage})
    plan.write_text(damage)
    with pytest.raises(ConfigError, match=r"pack\.json is damaged"):
        packed(folder, str(tmp_path / "to"))


@pytest.mark.parametrize("what", ["pack.json", INDEX])
def test_a_pack_of_a_newer_version_is_left_as_it_is(
    tmp_path: Path, folder: str, what: str, monkeypatch
) -> None:
    to = tmp_path / "to"
    with monkeypatch.context() as newer:
        newer.setitem(
            versions.VERSIONS, "pack.json" if what == "pack.json" else "manifest table", 2
        )
        packed(folder, str(to))
    plan = json.loads((to / "pack.json").read_text())
    if what == "pack.json":
        (to / what).write_text(json.dumps({**plan, "format": 2, "new": 1}))
    before = tree(str(to))
    with pytest.raises(versions.NewerVersion, match=rf"{what} has version 2 .*upgrade lightship"):
        packed(folder, str(to))
    assert tree(str(to)) == before
    if what == INDEX:
        with pytest.raises(versions.NewerVersion, match="upgrade lightship"):
            layouts.scan(str(to))


@pytest.mark.parametrize(
    "damage", ["cut", "another plan", "other samples", "no shard", "a sample less", "nested"]
)
def test_a_record_that_does_not_fit_is_no_record(
    tmp_path: Path, folder: str, monkeypatch, damage: str
) -> None:
    to = tmp_path / "to"
    all_but_the_index(monkeypatch, folder, str(to))
    shard = Shard("train", 1, 0, 0)
    record = to / shard.record_file
    content = json.loads(record.read_text())
    if damage == "cut":
        record.write_text(record.read_text()[:-9])
    elif damage == "nested":
        record.write_text("[" * 100_000)
    elif damage == "a sample less":
        record.write_text(json.dumps({**content, "ids": content["ids"][1:]}))
    elif damage == "no shard":
        (to / shard.file).write_bytes(b"")
    else:
        changed = {"another plan": {"key": "0"}, "other samples": {"samples": [0, 1]}}[damage]
        record.write_text(json.dumps({**content, **changed}))
    written: list[str] = []
    write = storage.write_file
    monkeypatch.setattr(
        storage, "write_file", lambda url, path: written.append(url) or write(url, path)
    )
    packed(folder, str(to))
    assert written == [str(to / shard.file), str(to / INDEX)]
    fresh = str(tmp_path / "fresh")
    packed(folder, fresh)
    assert tree(str(to)) == tree(fresh)


# ---- memory -----------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_data_set(tmp_path: Path) -> None:
    """400 MiB pass two threads of 100 MiB; hard links, so that they need not lie there twice."""
    mib, count = 2**20, 200
    first = tmp_path / "from" / "a" / "000.jpg"
    first.parent.mkdir(parents=True)
    first.write_bytes(b"\xff\xd8\xff" + np.random.default_rng(0).bytes(2 * mib))
    for i in range(1, count):
        path = tmp_path / "from" / "ab"[i % 2] / f"{i:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        os.link(first, path)
    tracemalloc.start()
    try:
        packed(str(tmp_path / "from"), str(tmp_path / "to"), shard_mib=40, threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    stored = sum(path.stat().st_size for path in (tmp_path / "to").rglob("*.tar"))
    assert stored > 2 * mib * count
    assert peak < 2 * 100 * mib


def test_only_a_packs_own_files_are_removed(folder: str, tmp_path: Path) -> None:
    """Also where a killed start has left some; other files stay, wherever they lie."""
    to = tmp_path / "to"
    packed(folder, str(to))
    (to / INDEX).unlink()
    ours = {
        ".packing/train/shard-99999.json", ".packing/scratch-abcdefg1/train-shard-00000.tar",
        f"train/.{'a' * 32}.lightship-tmp", f".packing/.{'a' * 32}.lightship-tmp",
    }  # fmt: skip
    mine = {
        ".packing/notes.txt", ".packing/train/notes.json", ".packing/scratch-mine/a.tar",
        ".packing/scratch-abcdefg1/notes.txt", ".a.lightship-tmp", ".git/.b.lightship-tmp",
    }  # fmt: skip
    for name in ours | mine:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_text("precious")
    packed(folder, str(to))
    assert not [name for name in ours if (to / name).exists()]
    assert [(to / name).read_text() for name in mine] == ["precious"] * len(mine)


@pytest.mark.parametrize(
    "name", [".packing", "train", ".packing/train", ".packing/scratch-abcdefg1"]
)
def test_a_folder_of_a_pack_that_is_a_link_is_refused(
    folder: str, tmp_path: Path, name: str
) -> None:
    to, victim = tmp_path / "to", tmp_path / "victim"
    packed(folder, str(to))
    (to / INDEX).unlink()
    for file in ("shard-00000.json", "shard-00000.tar", "train-shard-00000.tar", "unfinished"):
        put(str(victim), {file: b"precious"})
    (to / name).parent.mkdir(exist_ok=True)
    if name == "train":
        shutil.rmtree(to / name)
    (to / name).symlink_to(victim)
    with pytest.raises(ConfigError, match="is a link"):
        packed(folder, str(to))
    assert {path.read_bytes() for path in victim.iterdir()} == {b"precious"}
