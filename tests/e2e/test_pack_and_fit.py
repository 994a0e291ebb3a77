"""Shards train as their source does; kill -9 at any moment changes no byte of them."""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lightship import cli, storage
from lightship.checkpoint.store import CheckpointStore
from lightship.data.shards.index import INDEX, WORK
from lightship.data.sources import layouts
from tests.support.forked import Child, lightship
from tests.support.images import Files, little_set, parquet, put, tarred

# ---- training ----------------------------------------------------------------------------------

IMAGES = little_set(("train", "test"), per_class=12, size_px=(32, 32), image_format="jpeg")


def weights(output: str, root: str) -> dict[str, torch.Tensor]:
    """Of the last checkpoint after a short fit whose every step depends on order and pixels."""
    code = cli.main([
        "fit", f"--data.root={root}", f"--run.output={output}", "--run.tracking=none",
        "--data.global_batch_size=6", "--data.flip=true", "--data.crop_padding_px=4",
        "--data.cutmix_alpha=1", "--optim.lr=0.01", "--trainer.max_epochs=2",
    ])  # fmt: skip
    assert code == 0
    store = CheckpointStore(f"{output}/checkpoints")
    newest = store.newest()
    assert newest is not None
    return store.load_checkpoint(store.url_of(newest))["state_dict"]


@pytest.fixture(scope="module")
def from_folder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    path = tmp_path_factory.mktemp("folder")
    return weights(str(path / "run"), put(str(path / "images"), IMAGES))


@pytest.mark.parametrize(
    ("where", "source"),
    [("local", "folders"), ("memory", "Parquet"), ("s3", "tar"), ("s3", "folders")],
)
def test_a_folder_and_its_shards_train_alike(
    where: str, source: str, from_folder, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    files = {"folders": IMAGES, "tar": {"x.tar": tarred(IMAGES)}, "Parquet": parquet(IMAGES)}
    root = put(str(tmp_path / "from"), files[source])
    to = {"local": str(tmp_path / "to"), "memory": f"memory://pack-{source}/to"}.get(where)
    to = to or request.getfixturevalue("s3").url("to")
    assert cli.main(["pack", root, to, "--shard_mib=0.02"]) == 0
    assert len(layouts.scan(to)["train"].files) > 2
    got = weights(str(tmp_path / "run"), to)
    assert got.keys() == from_folder.keys()
    for name, expected in from_folder.items():
        assert torch.equal(got[name], expected), name


def test_predict_takes_packed_shards(tmp_path: Path) -> None:
    root, to = put(str(tmp_path / "from"), IMAGES), str(tmp_path / "to")
    run = f"--run.output={tmp_path}/run"
    assert cli.main(["pack", root, to, "--shard_mib=0.02"]) == 0
    weights(f"{tmp_path}/run", root)
    table = f"{tmp_path}/table.csv"
    assert cli.main(["predict", run, f"--data.root={to}", f"--predictions={table}"]) == 0
    rows = Path(table).read_text().splitlines()[1:]
    assert len(rows) == len(IMAGES)
    assert rows[0].startswith("test/shard-00000.tar#")


# ---- kill and resume ---------------------------------------------------------------------------

MANY = little_set(("train", "test"), per_class=40, size_px=(24, 24))
FLAGS = ["--shard_mib=0.05", "--threads=2", "--short_side_px=20"]


def everything(url: str) -> Files:
    """Every file under a URL, but without its own name in the plan's."""
    return {
        file.path: storage.read_bytes(storage.join(url, file.path))
        for file in storage.list_files(url)
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return put(str(tmp_path_factory.mktemp("images")), MANY)


@pytest.fixture(scope="module")
def unkilled(images: str, tmp_path_factory: pytest.TempPathFactory) -> Files:
    to = str(tmp_path_factory.mktemp("unkilled") / "to")
    assert cli.main(["pack", images, to, *FLAGS]) == 0
    files = everything(to)
    assert len([file for file in files if file.endswith(".tar")]) > 10
    return files


def trace(path: str, point: str = "", nth: int = 0, pause_s: float = 0.0) -> None:
    """In a child: note each shard that is written; SIGKILL itself when it passes a point."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    write_file, write_bytes, remove = storage.write_file, storage.write_bytes, storage.remove
    left = nth

    def passes(here: str) -> None:
        nonlocal left
        left -= here == point
        if here == point and left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def writing_file(url: str, path: Path) -> None:
        time.sleep(pause_s)
        is_index = url.endswith(INDEX)
        passes("before the index" if is_index else "before a shard")
        if not is_index:
            os.write(file, f"{'/'.join(url.split('/')[-2:])}\n".encode())
        write_file(url, path)
        passes("after the index" if is_index else "after a shard")

    def writing_bytes(url: str, data: Any) -> None:
        write_bytes(url, data)
        for ending, name in (("pack.json", "plan"), ("unfinished", "mark")):
            if url.endswith(ending):
                passes(f"after the {name}")
        if f"/{WORK}/" in url and url.endswith(".json"):
            passes("after a record")

    def removing(url: str) -> None:
        remove(url)
        if url.endswith(".json"):
            passes("in the removal")

    storage.write_file, storage.write_bytes = writing_file, writing_bytes  # type: ignore
    storage.remove = removing


def records(url: str) -> set[str]:
    """The shards that are committed, by what lies at DST alone."""
    try:
        held = [file.path for file in storage.list_files(url)]
    except storage.NotFound:
        return set()
    return {
        path.removeprefix(f"{WORK}/").replace(".json", ".tar")
        for path in held
        if path.startswith(f"{WORK}/") and path.endswith(".json")
    }


class Pack:
    """The same command again and again; what it wrote must be written once each."""

    def __init__(self, folder: Path, source: str, url: str) -> None:
        self.folder, self.source, self.url = folder, source, url
        self.traced, self.committed = folder / "written", set[str]()

    def start(self, *args: Any) -> Any:
        command = ["pack", self.source, self.url, *FLAGS]
        return lightship(command, self.folder, None, trace, (str(self.traced), *args))

    def written(self) -> list[str]:
        return self.traced.read_text().splitlines() if self.traced.exists() else []

    def check(self, before: int) -> None:
        """After a start: of what had been committed before it, it has written nothing again."""
        again = self.committed & set(self.written()[before:])
        assert not again
        self.committed |= records(self.url)

    def killed(self, child: Child, before: int) -> None:
        assert child.wait(60) == -signal.SIGKILL, child.output
        self.check(before)
        if not storage.exists(storage.join(self.url, INDEX)) and self.committed:
            with pytest.raises(layouts.DataError, match="is an unfinished pack"):
                layouts.scan(self.url)

    def finish(self) -> str:
        before = len(self.written())
        with self.start() as child:
            assert child.wait(60) == 0, child.output
        self.check(before)
        return child.output


POINTS = [
    ("after the mark", 1), ("after the plan", 1), ("before a shard", 2), ("after a shard", 1),
    ("after a record", 3), ("after a shard", 2), ("before the index", 1), ("after the index", 1),
    ("in the removal", 3),
]  # fmt: skip


@pytest.mark.parametrize("where", ["local", "s3"])
def test_killed_at_each_point(
    where: str, images: str, unkilled: Files, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """One DST; a start for each point, that kills itself there."""
    s3 = where == "s3"
    url = request.getfixturevalue("s3").url("to") if s3 else str(tmp_path / "to")
    job = Pack(tmp_path, images, url)
    for point, nth in POINTS:
        if point == "in the removal":  # which the start killed after the index has left to do
            assert storage.exists(storage.join(url, INDEX))
            assert records(url)
        before = len(job.written())
        with job.start(point, nth) as child:
            job.killed(child, before)
    said = job.finish()
    assert "already packed: 240 images" in said
    assert everything(url) == unkilled
    most = Counter(job.written()).most_common(1)[0][1]
    assert most <= 3, "only what a kill hit was written again"
    if where == "local":
        assert not (tmp_path / "to" / WORK).exists()


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(seed: int, images: str, unkilled: Files, tmp_path: Path) -> None:
    job, numbers = Pack(tmp_path, images, str(tmp_path / "to")), random.Random(seed)
    kills = 0
    while kills < 4 or len(job.committed) < 3:  # the first kills may hit before a commit
        before, wanted = len(job.written()), numbers.randrange(1, 4)
        with job.start("", 0, 0.02) as child:
            child.wait_for(lambda: len(job.written()) >= before + wanted)  # noqa: B023 (done here)
            time.sleep(numbers.random() / 20)
            child.signal(signal.SIGKILL)
            job.killed(child, before)
        kills += 1
    said = job.finish()
    assert f"{len(job.committed)} of them already written" in said
    assert everything(job.url) == unkilled
    assert not list((tmp_path / "to").rglob(".*.lightship-tmp"))


def test_a_record_is_removed_only_when_the_index_is_there(
    images: str, unkilled: Files, tmp_path: Path
) -> None:
    job = Pack(tmp_path, images, str(tmp_path / "to"))
    with job.start("in the removal", 5) as child:
        job.killed(child, 0)
    assert layouts.scan(job.url)["train"].class_names == ["ant", "bee", "cat"]
    job.finish()
    assert everything(job.url) == unkilled


@pytest.mark.parametrize("where", ["local", "s3"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(
    number: int, where: str, images: str, unkilled: Files, tmp_path: Path, request
) -> None:
    s3, scratch = where == "s3", tmp_path / "tmp"
    scratch.mkdir()
    url = request.getfixturevalue("s3").url("to") if s3 else str(tmp_path / "to")
    job = Pack(tmp_path, images, url)
    command = ["pack", images, url, *FLAGS]
    prepared = (str(job.traced), "", 0, 0.05)
    with lightship(command, tmp_path, {"TMPDIR": str(scratch)}, trace, prepared) as child:
        child.wait_for(lambda: len(job.written()) > 3)
        child.signal(number)
        assert child.wait(30) == 143, child.output
    name = signal.Signals(number).name
    assert f"lightship: stopped by {name}; rerun the command to resume" in child.output
    assert "Traceback" not in child.output
    assert not list(scratch.iterdir()), "no shard is left in the temporary folder"
    if where == "local":
        assert not list((tmp_path / "to" / WORK).glob("scratch-*"))
    job.committed = records(url)
    assert job.committed
    job.finish()
    assert everything(url) == unkilled
