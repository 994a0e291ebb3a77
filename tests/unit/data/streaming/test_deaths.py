"""A worker that dies of a sample or of anything else: the reading goes on, or ends with a line."""

import itertools
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightship.config import DataConfig
from lightship.data import image_split
from lightship.data.batch import NOT_COUNTED
from lightship.data.columns import Columns
from lightship.data.image_split import ImageSplit
from lightship.data.manifest import Manifest
from lightship.data.manifest_table import open_table, write_table
from lightship.data.sample_decoder import decode_all
from lightship.data.sources import layouts
from lightship.data.streaming import deaths as deaths_module
from lightship.data.streaming.loaders import StreamedSplit
from lightship.data.streaming.worker_process import Worker
from lightship.errors import DataError
from tests.support.crashing import CRASH, FOLDER
from tests.support.images import Files, little_set, put
from tests.unit.data.streaming.test_loaders import (
    PLACES,
    SIZE_PX,
    Pixels,
    endless,
    little_blocks,  # noqa: F401
    resident,
    rows_of,
    stream,
    streamed,
)


@pytest.fixture(scope="module")
def files() -> Files:
    return little_set(("train",), per_class=40)


def crashing(files: Files, *numbers: int, crash: bytes = CRASH) -> Files:
    """The same with some images at which the decoder crashes."""
    bad = {sorted(files)[number] for number in numbers}
    return {path: data + crash if path in bad else data for path, data in files.items()}


@pytest.fixture
def decoder_crashes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """From the next worker on."""
    Worker.stop()
    monkeypatch.setenv("PYTHONPATH", FOLDER)
    yield
    Worker.stop()


def manifest_of(files: Files, folder: Path) -> Manifest:
    return layouts.scan(put(str(folder), files))["train"]


def without(rows: Pixels, bad: set[int]) -> Pixels:
    return {place: [row for row in batch if row[0] not in bad] for place, batch in rows.items()}


@pytest.mark.usefixtures("decoder_crashes")
@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL"])
def test_a_sample_that_kills_the_worker_is_skipped_and_all_else_is_the_same(
    name: str, files: Files, tmp_path: Path, caplog
) -> None:
    crash = f"crash:{name}".encode()
    manifest = manifest_of(crashing(files, 7, crash=crash), tmp_path / "crashing")
    expected = resident(manifest, PLACES)
    split = streamed(manifest, most=0.1)
    got = stream(split, PLACES)
    assert without(got, {7}) == without(expected, {7})
    for i, label, _ in itertools.chain(*got.values()):
        assert (label == NOT_COUNTED) == (i == 7)
    assert set(split.bad.reasons) == {7}
    assert f"{manifest.name(7)}: the data worker was killed by {name}" in split.bad.reasons[7]
    assert caplog.text.count("the worker is started again without it") == 1, "not once an epoch"


@pytest.mark.usefixtures("decoder_crashes")
def test_a_sample_that_kills_the_worker_is_named(files: Files, tmp_path: Path) -> None:
    manifest = manifest_of(crashing(files, 7), tmp_path)
    named = rf"{manifest.name(7)}: the data worker was killed by SIGSEGV .*twice; .*on_error skip"
    with pytest.raises(DataError, match=named):
        stream(streamed(manifest), PLACES)


@pytest.mark.usefixtures("decoder_crashes")
def test_a_set_of_deadly_samples_ends_the_run(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deaths_module, "_MAX_DEADLY", 2)
    manifest = manifest_of(crashing(files, *range(0, 100, 9)), tmp_path)
    with pytest.raises(DataError, match=r"3 images have killed the data worker, more than 2; the"):
        stream(streamed(manifest, most=1.0), PLACES)


@pytest.mark.usefixtures("decoder_crashes")
def test_a_resident_set_is_decoded_where_a_crash_does_no_harm(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_split, "_WORKER_BYTES", 1)
    manifest = manifest_of(crashing(files, 7), tmp_path)
    images, _ = decode_all(manifest)
    config = DataConfig(image_size_px=SIZE_PX, on_error="skip", max_bad_fraction=0.1)
    split = ImageSplit(config, "train", manifest, SIZE_PX)
    assert split.decoded is not None, "it is resident"
    assert list(split.unreadable) == [7]
    images[7] = 0
    np.testing.assert_array_equal(split.decoded.numpy(), images)
    with pytest.raises(DataError, match=rf"{manifest.name(7)}: the data worker was killed"):
        ImageSplit(replace(config, on_error="raise"), "train", manifest, SIZE_PX)


def test_a_table_that_was_removed_is_still_read(files: Files, tmp_path: Path) -> None:
    manifest = manifest_of(files, tmp_path / "set")
    write_table(tmp_path / "table", {"train": manifest})
    mapped = open_table(Columns(tmp_path / "table"))["train"]
    (tmp_path / "table").unlink()
    assert stream(streamed(mapped), PLACES) == resident(manifest, PLACES)


class Unreadable:
    """A value that the worker cannot take."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.stat, ("/missing",)


def test_a_task_that_the_worker_cannot_take_is_named(files: Files, tmp_path: Path) -> None:
    split = streamed(manifest_of(files, tmp_path))
    split.deaths.deadly[0] = Unreadable()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"(?s)data worker failed.*FileNotFoundError.*/missing"):
        stream(split, PLACES)


def test_any_samples_are_read_by_the_worker_as_without_it(files: Files, tmp_path: Path) -> None:
    manifest = manifest_of(files, tmp_path)
    ids = np.random.default_rng(0).permutation(len(manifest))[:50]
    ids = np.concatenate([ids, ids[:7]])
    split = ImageSplit(DataConfig(mode="streaming", image_size_px=SIZE_PX), "train", manifest, 8)
    images, read = split.read(ids)
    np.testing.assert_array_equal(images, decode_all(manifest, ids)[0])
    np.testing.assert_array_equal(read, ids)
    assert len(split.read(ids[:0])[1]) == 0


def test_a_worker_that_is_killed_again_and_again_changes_nothing(
    files: Files, tmp_path: Path, caplog
) -> None:
    manifest = manifest_of(files, tmp_path)
    split = streamed(manifest)
    places = [(epoch, batch) for epoch in range(6) for batch in range(5)]
    got, kills = killed_between(split, places, 2)
    assert got == resident(manifest, places)
    assert kills == 2
    line = (
        "the data worker was killed by SIGKILL (out of memory? lower --data.prefetch_gib or "
        "--data.decode_gib); it is started again"
    )
    assert caplog.text.count(line) == kills
    assert not split.bad.reasons


def test_too_many_deaths_that_nothing_explains_end_the_run(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deaths_module, "_MAX_UNEXPLAINED", 1)
    places = [(epoch, batch) for epoch in range(90) for batch in range(5)]
    with pytest.raises(RuntimeError, match=r"data worker was killed by SIGKILL.*, 2 times in"):
        killed_between(streamed(manifest_of(files, tmp_path)), places, 99)


def killed_between(
    split: StreamedSplit, places: list[tuple[int, int]], max_kills: int
) -> tuple[Pixels, int]:
    """The batches at `places`, and how often a worker that made some of them was killed."""
    got: Pixels = {}
    loader = endless(split.decoder.manifest, split)
    killed: set[int] = set()
    try:
        batches = iter(loader)
        for place in places:
            got |= rows_of(batches, [place])
            assert loader._stream is not None
            pid = loader._stream.worker.process.pid
            if len(killed) < max_kills and pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
    finally:
        loader.close()
    return got, len(killed)
