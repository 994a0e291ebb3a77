"""`lightship predict` from any layout to any place; awkward images, orders to stop, mistakes."""

import csv
import json
import os
import re
import signal
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from lightship import cli, storage
from tests.support import forked_ranks
from tests.support.forked import lightship
from tests.support.images import (
    Files,
    encoded,
    little_set,
    parquet,
    put,
    tarred,
    webdataset,
    zipped,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run whose net is fed 16 px."""
    folder = tmp_path_factory.mktemp("trained")
    root = put(str(folder / "images"), little_set(("train", "val"), per_class=8))
    flags = [
        f"--data.root={root}", f"--run.output={folder}/run", "--run.tracking=none",
        "--data.image_size_px=16", "--data.global_batch_size=6",
        "--trainer.max_epochs=2", "--optim.lr=0.01", "--run.log_images=0",
    ]  # fmt: skip
    assert cli.main(["fit", *flags]) == 0
    return f"{folder}/run"


NEW = {f"new/{path.replace('/', '-')}": data for path, data in little_set(("test",)).items()}


def predict(run: str, root: str, table: str, *flags: str) -> list[dict[str, Any]]:
    """The rows of a new table, whatever its format."""
    said = [f"--run.output={run}", f"--data.root={root}", f"--predictions={table}", *flags]
    assert cli.main(["predict", *said]) == 0
    return rows_of(table)


def rows_of(table: str) -> list[dict[str, Any]]:
    data = storage.read_bytes(table)
    if table.endswith(".parquet"):
        return pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    if table.endswith(".jsonl"):
        return [json.loads(line) for line in data.split(b"\n")[:-1]]
    rows: list[dict[str, Any]] = list(csv.DictReader(data.decode().splitlines()))
    for row in rows:
        row |= {"probability": float(row["probability"]), "top5": json.loads(row["top5"])}
    return rows


def test_all_formats_say_the_same(run: str, tmp_path: Path) -> None:
    root = put(str(tmp_path / "images"), NEW)
    tables = [
        predict(run, root, str(tmp_path / f"t.{ending}")) for ending in ("csv", "jsonl", "parquet")
    ]
    assert tables[0] == tables[1] == tables[2]
    assert [row["path"] for row in tables[0]] == sorted(NEW)
    for row in tables[0]:
        assert row["top5"][0] == {"class": row["class"], "probability": row["probability"]}
        shares = [best["probability"] for best in row["top5"]]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=3e-6)
        assert {best["class"] for best in row["top5"]} == {"ant", "bee", "cat"}
    assert not list(tmp_path.glob("*.parts"))


def test_all_layouts_say_the_same(run: str, tmp_path: Path, s3) -> None:
    """And name the image so that a person finds it."""
    files = little_set(("test",))
    shards = webdataset(files, shard_size=5)
    del shards["classes.txt"]
    roots = {
        "folder": put(str(tmp_path / "folder"), files),
        "s3": put(s3.url("new"), files),
        "memory": put(f"memory://{uuid.uuid4().hex}", files),
        "zip": f"{put(str(tmp_path / 'z'), {'a.zip': zipped(files)})}/a.zip",
        "tar": f"{put(str(tmp_path / 't'), {'a.tar': tarred(files)})}/a.tar",
        "tar.gz": f"{put(str(tmp_path / 'g'), {'a.tar.gz': tarred(files, True)})}/a.tar.gz",
        "shards": put(s3.url("shards"), shards),
        "parquet": put(str(tmp_path / "p"), parquet(files)),
    }
    expected: list[list[dict]] = []
    for name, root in roots.items():
        rows = predict(run, root, str(tmp_path / f"{name}.jsonl"))
        paths = [row.pop("path") for row in rows]
        if name in ("folder", "s3", "memory", "zip"):
            assert paths == sorted(files), name
        elif name in ("tar", "tar.gz"):
            assert paths == [f"a.{name}#{path}" for path in sorted(files)]
        elif name == "shards":
            assert paths[:6] == [f"test-000.tar#{i:06d}.png" for i in range(5)] + [
                "test-001.tar#000005.png"
            ]
        else:
            assert paths[:2] == [f"data/test-00000-of-00003.parquet#{row}" for row in range(2)]
        assert len(set(paths)) == len(files)
        expected.append(rows)
        assert rows == expected[0], name


def test_resident_is_streamed(run: str, tmp_path: Path) -> None:
    root = put(str(tmp_path / "images"), NEW)
    streamed = predict(run, root, str(tmp_path / "1.jsonl"))
    assert predict(run, root, str(tmp_path / "2.jsonl"), "--data.mode=resident") == streamed


@pytest.mark.parametrize("size", [1, 5, 12, 512])
def test_any_batch_size(run: str, tmp_path: Path, size: int) -> None:
    root = put(str(tmp_path / "images"), NEW)
    expected = predict(run, root, str(tmp_path / "1.jsonl"))
    rows = predict(run, root, str(tmp_path / "2.jsonl"), f"--data.eval_batch_size={size}")
    assert [row["path"] for row in rows] == [row["path"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row["probability"] == pytest.approx(other["probability"], abs=2e-6)


def test_one_image(run: str, tmp_path: Path) -> None:
    root = put(str(tmp_path / "images"), {"a.png": next(iter(NEW.values()))})
    (row,) = predict(run, f"{root}/a.png", str(tmp_path / "t.csv"))
    assert row["path"] == "a.png"


def awkward() -> Files:
    """Images that a camera roll has: of many sizes, kinds and names."""
    rng = np.random.default_rng(1)
    colour = rng.integers(0, 256, (30, 17, 3), dtype=np.uint8)
    return {
        "ünï cödé 漢字.png": encoded(colour),
        'with "quotes", and commas.png': encoded(colour[:, ::-1]),
        "line\nbreak.png": encoded(colour[::-1]),
        "deep/er/and/deeper/x.JPG": encoded(colour, "jpg"),
        "grey.png": encoded(colour[..., 0]),
        "alpha.png": encoded(np.dstack([colour, colour[..., :1]])),
        "#1 50%.webp": encoded(colour, "webp"),
        "one pixel.png": encoded(colour[:1, :1]),
    }


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_awkward_images_and_names(run: str, tmp_path: Path, ending: str) -> None:
    root = put(str(tmp_path / "images"), awkward())
    raw = (tmp_path / "images" / "grey.png").read_bytes()
    Path(f"{root}/not-utf8-\udcff.png").write_bytes(raw)
    (tmp_path / "images" / "notes.txt").write_text("no image, and not looked at")
    table = tmp_path / f"t.{ending}"
    predict(run, root, str(tmp_path / "t.jsonl"))
    expected = rows_of(str(tmp_path / "t.jsonl"))
    assert sorted(row["path"] for row in expected) == sorted([*awkward(), "not-utf8-\ufffd.png"])
    predict(run, root, str(table))
    if ending == "csv":
        with table.open(encoding="utf-8", newline="") as file:
            assert [row["path"] for row in csv.DictReader(file)] == [r["path"] for r in expected]
    else:
        assert rows_of(str(table)) == expected


def test_the_summary_counts_what_no_reader_takes(run: str, tmp_path: Path, capsys) -> None:
    root = put(str(tmp_path / "images"), {**NEW, "new/a.heic": b"x", "new/b.heic": b"x"})
    predict(run, root, str(tmp_path / "t.csv"))
    [done] = [line for line in capsys.readouterr().err.splitlines() if "done: " in line]
    assert f"done: {len(NEW)} predictions: " in done
    assert "; not read: 2 .heic files" in done


@pytest.mark.parametrize("mode", ["auto", "resident"])
def test_unreadable_images(
    run: str, tmp_path: Path, mode: str, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = {"new/0-empty.png": b"", "new/text.jpg": b"not an image", "new/torn.png": None}
    torn = next(iter(NEW.values()))[:60]
    root = put(str(tmp_path / "images"), {**NEW, **{k: v if v is not None else torn
                                                    for k, v in bad.items()}})  # fmt: skip
    table = tmp_path / "t.csv"
    said = ["predict", f"--run.output={run}", f"--data.root={root}", f"--data.mode={mode}",
            f"--predictions={table}"]  # fmt: skip
    assert cli.main(said) == 65
    assert any(name in capfd.readouterr().err for name in bad)
    assert not table.exists()

    skip = [*said, "--data.on_error=skip"]
    assert cli.main([*skip, "--data.max_bad_fraction=0.19"]) == 65  # 3 of 15 are 0.2
    assert "max_bad_fraction 0.19" in capfd.readouterr().err
    assert not table.exists()

    assert cli.main([*skip, "--data.max_bad_fraction=0.2"]) == 0
    last = capfd.readouterr().err.splitlines()[-1]
    assert f"done: {len(NEW)} predictions" in last
    assert f"cannot be read: 3 ({', '.join(sorted(bad))})" in last
    assert [row["path"] for row in rows_of(str(table))] == sorted(NEW)


def test_nothing_but_unreadable_images(
    run: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = put(str(tmp_path / "images"), {"a.png": b"no", "b.png": b""})
    flags = ["--data.on_error=skip", "--data.max_bad_fraction=1"]
    table = tmp_path / "t.csv"
    said = [f"--run.output={run}", f"--data.root={root}", f"--predictions={table}", *flags]
    assert cli.main(["predict", *said]) == 65
    assert "none of 2 images can be read" in capfd.readouterr().err
    assert not table.exists()


def test_a_remote_table_and_checkpoint(run: str, tmp_path: Path, s3) -> None:
    root = put(s3.url("new"), NEW)
    payload = next(Path(run, "checkpoints").glob("*.ckpt"))
    checkpoint = s3.url("model.ckpt")
    storage.write_bytes(checkpoint, payload.read_bytes())
    table = s3.url("table.parquet")
    said = [f"--ckpt_path={checkpoint}", f"--data.root={root}", f"--predictions={table}"]
    assert cli.main(["predict", *said]) == 0
    beside = [file.path for file in storage.list_files(table.rpartition("/")[0])]
    assert beside == ["table.parquet"], "and no parts"
    expected = predict(run, root, str(tmp_path / "t.jsonl"), f"--ckpt_path={payload}")
    assert rows_of(table) == expected


def slow() -> None:
    """In a child: a quarter of a second a batch."""
    from lightship.models.classifier import ImageClassifier

    step = ImageClassifier.predict_step

    def slowly(self: ImageClassifier, *arguments: Any) -> Any:
        time.sleep(0.25)
        return step(self, *arguments)

    ImageClassifier.predict_step = slowly  # type: ignore[method-assign]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop(run: str, tmp_path: Path, number: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4000, 2, 2, 3), dtype=np.uint8)
    files = {f"{i:04d}.png": encoded(image) for i, image in enumerate(pixels)}
    put(str(tmp_path), {"a.tar": tarred(files)})
    said = ["predict", f"--run.output={run}", f"--data.root={tmp_path}/a.tar",
            f"--predictions={tmp_path}/t.csv", "--run.log_format=json"]  # fmt: skip
    parts = tmp_path / "t.csv.parts"
    with lightship(said, tmp_path, prepare=slow) as child:
        child.wait_for(lambda: list(parts.glob("000000-*")))
        child.signal(number)
        assert child.wait() == 143
    assert "Traceback" not in child.output
    assert "rerun the command to resume" in child.output
    kept = len(list(parts.glob("*-*.jsonl")))
    assert 1 <= kept < 4

    with lightship(said, tmp_path) as child:
        assert child.wait() == 0, child.output
    events = [json.loads(line) for line in child.output.splitlines()]
    work = [event for event in events if event["event"] == "work"]
    assert work[-1]["done"] == work[-1]["total"] == 4000
    assert {event["unit"] for event in work} == {"images"}
    assert f"; {kept * 1024} are done" in events[0]["text"]
    assert len(rows_of(f"{tmp_path}/t.csv")) == 4000


def test_other_images_start_anew(
    run: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What stopped at a bad image keeps its parts; another image more, and they are of no use."""
    root = put(str(tmp_path / "images"), NEW)
    table = f"{tmp_path}/t.csv"
    storage.write_bytes(f"{table}.parts/000000-0123456789ab.jsonl", b"of another table")
    rows = predict(run, root, table)
    assert "starting over" in capfd.readouterr().err
    assert len(rows) == len(NEW)
    assert not Path(f"{table}.parts").exists()


def bitmaps(seed: int) -> Files:
    """Two parts of images: the same names and sizes for any seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (1030, 4, 4, 3), dtype=np.uint8)
    return {f"{i:04d}.bmp": encoded(image, "bmp") for i, image in enumerate(pixels)}


def stop_after_the_first_part(said: list[str], table: str) -> None:
    """A prediction that meets an image it may not skip in its second part."""
    assert cli.main(said) == 65
    deadline = time.monotonic() + 20
    while not list(Path(f"{table}.parts").glob("000000-*")):
        assert time.monotonic() < deadline, "the first part is written in the background"
        time.sleep(0.01)


def test_images_of_another_root_start_anew(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where they have the same names and sizes, as those of a camera."""
    first, second = bitmaps(1), bitmaps(2)
    first["1029.bmp"] = bytes(len(first["1029.bmp"]))
    put(str(tmp_path / "day1" / "images"), first)
    put(str(tmp_path / "day2" / "images"), second)
    table = f"{tmp_path}/t.jsonl"
    said = ["predict", f"--run.output={run}", "--data.root=images", f"--predictions={table}"]
    monkeypatch.chdir(tmp_path / "day1")
    stop_after_the_first_part(said, table)
    monkeypatch.chdir(tmp_path / "day2")
    assert cli.main(said) == 0
    assert rows_of(table) == predict(run, "images", f"{tmp_path}/new.jsonl")


@pytest.fixture
def two_large(run: str, tmp_path: Path) -> tuple[list[str], str]:
    """A prediction of two parts with an image each that is too large, and its table."""
    files = bitmaps(1)
    files |= {f"{i}.bmp": encoded(np.zeros((80, 80, 3), np.uint8), "bmp") for i in ("0005", "1029")}
    root, table = put(str(tmp_path / "images"), files), f"{tmp_path}/t.jsonl"
    said = ["predict", f"--run.output={run}", f"--data.root={root}", f"--predictions={table}"]
    skip = ["--data.on_error=skip", "--data.max_bad_fraction=0.001"]
    stop_after_the_first_part([*said, *skip, "--data.max_sample_mib=0.01"], table)
    return said, table


def test_what_can_be_read_now_is_predicted(
    two_large: tuple[list[str], str], run: str, tmp_path: Path
) -> None:
    said, table = two_large
    assert cli.main(said) == 0
    assert rows_of(table) == predict(run, f"{tmp_path}/images", f"{tmp_path}/new.jsonl")


def test_what_still_cannot_be_read_loses_no_part(
    two_large: tuple[list[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    said, table = two_large
    said.append("--data.max_sample_mib=0.015")
    capfd.readouterr()
    assert cli.main(said) == 65
    error = capfd.readouterr().err.splitlines()[-1]
    assert "0005.bmp has 19254 bytes, more than --data.max_sample_mib 0.015 allows" in error
    assert cli.main([*said, "--data.on_error=skip"]) == 0
    assert "; 1024 are done" in capfd.readouterr().err
    assert len(rows_of(table)) == 1028


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--run.output=RUN", "--predictions=t.txt"], 78, "--predictions t.txt"),
        (["--run.output=RUN", "--predictions=table"], 78, ".parquet, .csv, .jsonl"),
        (["--run.output=RUN", "--ckpt_path=gone.ckpt", "--predictions=t.csv"], 78, "gone.ckpt"),
        (["--ckpt_path=gone.ckpt", "--predictions=t.csv"], 78, "gone.ckpt"),
        (["--ckpt_path=model.ckpt"], 2, "--predictions"),
        (["--ckpt_path=best", "--predictions=t.csv"], 2, "--run.output"),
        (["--predictions=t.csv"], 2, "--run.output"),
        (["--run.output=RUN", "--data.root=gone", "--predictions=t.csv"], 65, "gone"),
        (
            ["--run.output=RUN", "--predictions=https://x.invalid/t.csv"],
            78,
            "--predictions https://x.invalid/",
        ),
        (["--run.output=RUN", "--predictions=/proc/t.csv"], 78, "--predictions /proc/"),
    ],
)
def test_mistakes(
    flags: list[str],
    code: int,
    told: str,
    run: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    said = [flag.replace("RUN", run) for flag in flags]
    assert cli.main(["predict", *said]) == code
    error = capfd.readouterr().err
    assert told in error.splitlines()[-1]
    assert "Traceback" not in error


PAGE = (ROOT / "docs" / "predict.md").read_text()
COMMANDS = re.findall(r"^    (lightship .*)$", PAGE, re.MULTILINE)


def test_the_page_from_top_to_bottom(run: str, tmp_path: Path, s3) -> None:
    assert len(COMMANDS) == 5
    bucket = s3.url("page")
    for path in Path(run).rglob("*"):
        if path.is_file():
            name = path.relative_to(run)
            put(f"{tmp_path}/runs/mine", {str(name): path.read_bytes()})
            put(f"{bucket}/runs/1", {str(name): path.read_bytes()})
            if path.suffix == ".ckpt":
                (tmp_path / "model.ckpt").write_bytes(path.read_bytes())
    put(str(tmp_path / "new_images"), NEW)
    put(f"{bucket}/new", NEW)
    (tmp_path / "new_images.zip").write_bytes(zipped(NEW))
    env = {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", forked_ranks.VARIABLE: "1"}
    for command in COMMANDS:
        arguments = command.replace("s3://bucket", bucket).split()[1:]
        with lightship(arguments, tmp_path, env, os.chdir, (tmp_path,)) as child:
            assert child.wait() == 0, child.output
        named = command.partition("--predictions ")[2].split()[0]
        table = named.replace("s3://bucket", bucket) if "://" in named else f"{tmp_path}/{named}"
        assert [row["path"] for row in rows_of(table)] == sorted(NEW), command
        storage.remove(table)
