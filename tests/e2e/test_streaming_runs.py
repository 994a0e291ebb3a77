"""Runs whose images are streamed: the same weights as resident ones, also when they are killed."""

import random
import signal
import time
from pathlib import Path

import pytest

from lightship import storage
from tests.support.crashing import CRASH, FOLDER
from tests.support.images import Files, little_set, put, webdataset
from tests.support.killing import STEPS, Job, assert_as_if_never_killed, kill_once, many_images
from tests.support.runs import differences, last_state

STREAMED = ["--data.mode=streaming"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return many_images(str(tmp_path_factory.mktemp("images")))


@pytest.fixture(scope="module")
def resident(images: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    path = tmp_path_factory.mktemp("resident")
    job = Job(path, str(path / "run"), images)
    ids = job.finish()
    return last_state(job.output), ids


def in_its_own(folder: Path) -> dict[str, str]:
    """The environment of a job whose processes can be told from those of other tests."""
    return {"TMPDIR": str(folder)}


def workers(folder: Path) -> set[int]:
    """Processes that decode for a job with `in_its_own(folder)`."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"lightship.data.streaming.worker import main" in (process / "cmdline").read_bytes():
                variables = (process / "environ").read_bytes().split(b"\0")
                if f"TMPDIR={folder}".encode() in variables:
                    found.add(int(process.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def wait_for_workers_end(folder: Path) -> None:
    """They see the end of their run, and finish the image that they are decoding."""
    until = time.monotonic() + 20
    while workers(folder):
        assert time.monotonic() < until, "a worker outlived its run"
        time.sleep(0.05)


@pytest.mark.parametrize("where", ["local", "s3"])
def test_streamed_is_resident_bit_for_bit(
    where: str, images: str, resident, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if where == "s3":
        images = many_images(request.getfixturevalue("s3").url("images"))
    job = Job(tmp_path, str(tmp_path / "run"), images, STREAMED, in_its_own(tmp_path))
    assert job.finish() == resident[1]
    assert differences(resident[0], last_state(job.output)) == []
    wait_for_workers_end(tmp_path)


def test_killed_and_started_again_until_it_is_done(images: str, resident, tmp_path: Path) -> None:
    job = Job(tmp_path, str(tmp_path / "run"), images, list(STREAMED), in_its_own(tmp_path))
    job.saving()
    numbers = random.Random(5)
    for kind in ("random", "in a write", "random"):
        kill_once(job, kind, numbers)
        wait_for_workers_end(tmp_path)
    assert_as_if_never_killed(job, *resident)


def test_told_to_stop(images: str, resident, tmp_path: Path) -> None:
    job = Job(tmp_path, str(tmp_path / "run"), images, STREAMED, in_its_own(tmp_path))
    with job.start() as child:
        child.wait_for(lambda: len(child.steps()) > 3)
        assert workers(tmp_path)
        child.signal(signal.SIGTERM)
        assert child.wait(60) == 143, child.output
        wait_for_workers_end(tmp_path)
        assert "Traceback" not in child.output
        newest = job.newest()
        assert newest is not None
        assert newest.step == len(child.steps()) < STEPS
    assert_as_if_never_killed(job, *resident)


def test_killed_with_random_boxes_and_parts_of_epochs(images: str, tmp_path: Path) -> None:
    flags = [
        "--data.crop_min_area=0.2", "--data.image_size_px=8", "--trainer.limit_train_batches=5",
    ]  # fmt: skip
    whole = Job(tmp_path / "1", str(tmp_path / "1" / "run"), images, list(flags))
    ids = whole.finish()
    job = Job(tmp_path / "2", str(tmp_path / "2" / "run"), images, list(flags)).saving()
    with job.start() as child:
        child.wait_for(lambda: len(child.steps()) > 7)
        child.kill()
    assert_as_if_never_killed(job, last_state(whole.output), ids)


def spoilt(files: Files) -> Files:
    """One image of train, and one of test, is none."""
    return {**files, "train/ant/003.png": b"none", "test/bee/001.png": b""}


def draw_all() -> None:
    """In a child: the report with its pictures."""


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_bad_images(policy: str, tmp_path: Path) -> None:
    root = put(str(tmp_path / "images"), spoilt(little_set(per_class=16)))
    flags = [*STREAMED, f"--data.on_error={policy}", "--data.max_bad_fraction=0.1"]
    job = Job(tmp_path, str(tmp_path / "run"), root, flags)
    with job.start(draw_all) as child:
        code = child.wait()
    if policy == "raise":
        assert code == 65, child.output
        assert "train/ant/003.png" in child.output
        assert "Traceback" not in child.output
        return
    assert code == 0, child.output
    assert "test: 1 of 48 images could not be read and are skipped" in child.output
    page = storage.read_bytes(f"{job.output}/report/report.html").decode()
    for name in ("train/ant/003.png", "test/bee/001.png"):
        assert name in page
    assert last_state(job.output)["DONE"]["test/num_samples"] == 47


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_an_image_that_kills_the_worker_is_as_a_bad_one(policy: str, tmp_path: Path) -> None:
    """By a real SIGSEGV: skipped, the weights are those of a run where it is no image."""
    files, deadly = little_set(per_class=16), "train/bee/007.png"
    flags = [*STREAMED, f"--data.on_error={policy}", "--data.max_bad_fraction=0.1"]
    crashing = Job(
        tmp_path / "crash",
        str(tmp_path / "crash" / "run"),
        put(str(tmp_path / "crash" / "images"), {**files, deadly: files[deadly] + CRASH}),
        flags,
        {"PYTHONPATH": FOLDER},
    )
    with crashing.start() as child:
        code = child.wait()
    assert f"{deadly}: the data worker was killed by SIGSEGV while decoding it" in child.output
    assert "Traceback" not in child.output
    if policy == "raise":
        assert code == 65, child.output
        return
    assert code == 0, child.output
    assert "train: 1 of 48 images could not be read and are skipped" in child.output
    bad = Job(
        tmp_path / "bad",
        str(tmp_path / "bad" / "run"),
        put(str(tmp_path / "bad" / "images"), {**files, deadly: b"no image"}),
        flags,
    )
    assert bad.finish() == child.ids_of_parts()
    found = differences(last_state(bad.output), last_state(crashing.output))
    assert all(line.startswith("/ImageData/train/") for line in found), "which name the bad files"


def test_gzip_says_to_pack_first(tmp_path: Path) -> None:
    files = webdataset(little_set(per_class=16), shard_size=12, gzipped=True)
    root = put(str(tmp_path / "images"), files)
    with Job(tmp_path, str(tmp_path / "run"), root, STREAMED).start() as child:
        assert child.wait() == 78
        assert "lightship pack" in child.output
        assert "Traceback" not in child.output
