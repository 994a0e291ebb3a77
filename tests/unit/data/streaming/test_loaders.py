"""Streaming gives the batches that a resident split gives, from any source, place and rank."""

import hashlib
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lightship import storage
from lightship.config import DataConfig
from lightship.data import manifest as manifests
from lightship.data.augment import Augment
from lightship.data.bad_samples import BadSamples
from lightship.data.batch import NOT_COUNTED
from lightship.data.images.resize import DEFAULT_RESIZE
from lightship.data.manifest import Manifest
from lightship.data.order import Order
from lightship.data.order_versions import NEWEST, order_of
from lightship.data.resident import ResidentEvalLoader, ResidentSplit, ResidentTrainLoader
from lightship.data.sample_decoder import SampleDecoder, decode_all
from lightship.data.sample_reader import checked
from lightship.data.shares import EvalShare, TrainShare
from lightship.data.size_schedule import SizeSchedule
from lightship.data.sources import layouts
from lightship.data.splits import load_splits
from lightship.data.streaming import cache as cache_module
from lightship.data.streaming.cache import BlockCache, CachedReads
from lightship.data.streaming.loaders import StreamedEvalLoader, StreamedSplit, StreamedTrainLoader
from lightship.data.streaming.prefetch import BatchRange, Fetcher
from lightship.data.streaming.worker_process import Worker
from lightship.errors import DataError, TimeoutExpired
from lightship.storage import ReadAhead
from tests.support.faults import FaultProxy
from tests.support.images import Files, little_set, parquet, put, tarred, webdataset, zipped
from tests.support.s3 import S3Server

CPU = torch.device("cpu")
SIZE_PX, BATCH, SEED = 8, 24, 3
Pixels = dict[tuple[int, int], list[tuple[int, int, str]]]
"""(epoch, batch) -> (id, label, hash of the pixels) of each row."""


@pytest.fixture(autouse=True)
def little_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of some nine of our little images, and no set too small to have them."""
    monkeypatch.setattr(manifests, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(manifests, "_SMALL_BYTES", 0)


@pytest.fixture(scope="module")
def files() -> Files:
    return little_set(("train",), per_class=40)


def order(manifest: Manifest, batch_size: int = BATCH, version: int = NEWEST) -> Order:
    return order_of(manifest, batch_size, SEED, version)


def streamed(
    manifest: Manifest,
    budget_bytes: int = 2**30,
    most: float | None = None,
    cache_bytes: int = 0,
) -> StreamedSplit:
    bad = BadSamples(manifest, len(manifest), most)
    decoder = SampleDecoder(manifest, SIZE_PX, resize=None)
    return StreamedSplit(decoder, 2, budget_bytes, cache_bytes, bad, CPU)


def rows_of(batches: Iterator, places: list[tuple[int, int]]) -> Pixels:
    found = {}
    for place in places:
        batch = next(batches)
        rows = zip(batch.ids.tolist(), batch.labels.tolist(), batch.images, strict=True)
        found[place] = [
            (i, label, hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest())
            for i, label, image in rows
        ]
    return found


def stream(
    split: StreamedSplit,
    places: list[tuple[int, int]],
    rank: int = 0,
    world_size: int = 1,
    parts: int = 1,
    epochs: int | None = 2,
    min_area: float = 0.0,
    augment: Augment | None = None,
    sizes: SizeSchedule | None = None,
) -> Pixels:
    """The batches at `places`, whatever comes before the first."""
    share = TrainShare(order(split.decoder.manifest), rank, world_size, parts)
    where = iter(places)
    loader = StreamedTrainLoader(
        split,
        share,
        augment or Augment(SEED),
        min_area,
        lambda: BatchRange(*next(where), batches_per_epoch=len(share), epochs=epochs),
        sizes,
    )
    try:
        return rows_of(iter(loader), places)
    finally:
        loader.close()


def resident(
    manifest: Manifest, places: list[tuple[int, int]], augment: Augment | None = None
) -> Pixels:
    images, _ = decode_all(manifest)
    split = ResidentSplit.from_arrays(
        images, manifest.label, np.zeros(len(manifest), dtype=bool), CPU
    )
    share, where = TrainShare(order(manifest), 0, 1, 1), iter(places)
    loader = ResidentTrainLoader(split, share, augment or Augment(SEED), lambda: next(where))
    return rows_of(iter(loader), places)


PLACES = [(epoch, batch) for epoch in range(2) for batch in range(5)]
LAYOUTS: dict[str, Callable[[Files], tuple[Files, str]]] = {
    "folder": lambda files: (files, ""),
    "webdataset": lambda files: (webdataset(files, shard_size=50), ""),
    "tar": lambda files: ({"set.tar": tarred(files)}, "set.tar"),
    "zip": lambda files: ({"set.zip": zipped(files)}, "set.zip"),
    "parquet": lambda files: (parquet(files, per_file=30), ""),
}


@pytest.mark.parametrize("where", ["local", "s3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_ids_order_and_pixels_as_resident(
    layout: str, where: str, files: Files, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path) if where == "local" else request.getfixturevalue("s3").url(layout)
    content, name = LAYOUTS[layout](files)
    put(root, content)
    url = storage.join(root, name)
    manifest = layouts.scan(f"zip://::{url}" if layout == "zip" else url)["train"]
    assert stream(streamed(manifest), PLACES) == resident(manifest, PLACES)


@pytest.fixture
def manifest(files: Files, tmp_path: Path) -> Manifest:
    return layouts.scan(put(str(tmp_path / "set"), webdataset(files, shard_size=50)))["train"]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_make_the_global_batches_of_one(world_size: int, manifest: Manifest) -> None:
    whole = resident(manifest, PLACES)
    shares = [stream(streamed(manifest), PLACES, rank, world_size) for rank in range(world_size)]
    for place in PLACES:
        assert [row for share in shares for row in share[place]] == whole[place]


def test_a_folder_and_its_shards_come_in_the_same_order(files: Files, tmp_path: Path) -> None:
    folder = layouts.scan(put(str(tmp_path / "folder"), files))["train"]
    shards = layouts.scan(put(str(tmp_path / "shards"), webdataset(files, shard_size=50)))["train"]
    assert stream(streamed(folder), PLACES) == stream(streamed(shards), PLACES)


@pytest.mark.parametrize(
    "augment",
    [Augment(SEED, flip=True), Augment(SEED, flip=True, flip_in_turn=True),
     Augment(SEED, flip=True, crop_padding_px=2, cutout_px=2),
     Augment(SEED, flip=True, mixup_alpha=1.0)],
    ids=["flip", "in turn", "crop, flip, cutout", "flip, mixup"],
)  # fmt: skip
def test_augmented_alike(augment: Augment, manifest: Manifest) -> None:
    ours = stream(streamed(manifest), PLACES, augment=augment)
    assert ours == resident(manifest, PLACES, augment)
    assert ours != resident(manifest, PLACES)


def test_parts_of_a_batch(manifest: Manifest) -> None:
    parts = [(epoch, part) for epoch in range(2) for part in range(10)]
    cut, whole = stream(streamed(manifest), parts, parts=2), resident(manifest, PLACES)
    for epoch, batch in PLACES:
        together = cut[epoch, 2 * batch] + cut[epoch, 2 * batch + 1]
        assert together == whole[epoch, batch]


@pytest.mark.parametrize("first", [1, 4, 5, 7, 9])
def test_going_on_from_any_place(first: int, manifest: Manifest) -> None:
    whole = resident(manifest, PLACES)
    assert stream(streamed(manifest), PLACES[first:]) == {p: whole[p] for p in PLACES[first:]}


def test_a_place_that_does_not_follow_starts_the_reading_anew(manifest: Manifest) -> None:
    places = [(0, 0), (0, 1), (0, 4), (1, 0), (0, 2)]
    whole = resident(manifest, PLACES)
    assert stream(streamed(manifest), places) == {place: whole[place] for place in places}


@pytest.mark.parametrize("budget_bytes", [1, 3000, 10_000])
def test_a_small_budget_changes_nothing_but_the_requests(
    budget_bytes: int, manifest: Manifest
) -> None:
    assert stream(streamed(manifest, budget_bytes), PLACES) == resident(manifest, PLACES)


def test_random_boxes_are_of_seed_epoch_and_sample_alone(files: Files, tmp_path: Path) -> None:
    manifest = layouts.scan(put(str(tmp_path), files))["train"]
    whole = stream(streamed(manifest), PLACES, min_area=0.3)
    halves = [stream(streamed(manifest), PLACES[3:], rank, 2, min_area=0.3) for rank in range(2)]
    for place in PLACES[3:]:
        assert halves[0][place] + halves[1][place] == whole[place]
    plain = stream(streamed(manifest), PLACES)
    boxes = {(place, row[0]): row[2] for place in PLACES for row in whole[place]}
    full = {(place, row[0]): row[2] for place in PLACES for row in plain[place]}
    changed = sum(boxes[key] != full[key] for key in full)
    assert changed > 0.9 * len(full)
    again = [(i, hashes) for (_, i), hashes in boxes.items()]
    assert len(set(again)) > 0.9 * len(again), "another box in another epoch"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_is_that_of_a_resident_split(world_size: int, manifest: Manifest) -> None:
    images, _ = decode_all(manifest)
    held = ResidentSplit.from_arrays(
        images, manifest.label, np.zeros(len(manifest), dtype=bool), CPU
    )
    seen = []
    for rank in range(world_size):
        share = EvalShare(len(manifest), 32, rank, world_size)
        for ours, theirs in zip(
            StreamedEvalLoader(streamed(manifest), share),
            ResidentEvalLoader(held, share),
            strict=True,
        ):
            assert torch.equal(ours.ids, theirs.ids)
            assert torch.equal(ours.labels, theirs.labels)
            counted = ours.ids >= 0
            assert torch.equal(ours.images[counted], theirs.images[counted])
            seen += ours.ids[counted].tolist()
    assert seen == list(range(len(manifest)))


class TestFetching:
    """What is read, counted: of packed samples a block at a time, once, within the budget."""

    def fetched(
        self, manifest: Manifest, budget_bytes: int, monkeypatch: pytest.MonkeyPatch,
        rank: int = 0, world_size: int = 1, first: int = 0, version: int = NEWEST,
    ) -> tuple[list[storage.Span], int]:  # fmt: skip
        """The requests of an epoch from a place on, and the most bytes held."""
        share = TrainShare(order(manifest, version=version), rank, world_size, 1)
        spans: list[storage.Span] = []
        fetcher = Fetcher(
            manifest,
            share.order.blocks or manifest.blocks(),
            share,
            BatchRange(0, first, len(share), 1),
            budget_bytes,
            share.order.mixed_bytes // world_size,
        )
        begin = fetcher._reads.begin
        monkeypatch.setattr(
            fetcher._reads, "begin", lambda span: (spans.append(span), begin(span))[1]
        )
        most, batches = 0, 0
        for batch in fetcher:
            most, batches = max(most, fetcher.held_bytes), batches + 1
            samples = dict(batch.samples)
            fetcher.release(batch)
            assert sorted(samples) == list(range(len(batch.ids)))
            for row, i in enumerate(batch.ids.tolist()):
                assert not isinstance(checked(manifest, i, samples[row]), DataError)
        assert batches == len(share) - first
        assert fetcher.held_bytes == 0
        fetcher.close()
        return spans, most

    @pytest.mark.parametrize("version", [1, 2])
    def test_each_block_is_one_request(self, version: int, manifest, monkeypatch) -> None:
        spans, _ = self.fetched(manifest, 2**30, monkeypatch, version=version)
        blocks = manifest.blocks().count
        shards = len(manifest.files)
        assert blocks > 10
        assert len(spans) <= blocks + shards, "a block may lie in two shards"

    def test_a_block_is_read_by_one_rank(self, files: Files, tmp_path: Path, monkeypatch) -> None:
        """But for the blocks that are cut at the lanes' ends."""
        many = little_set(("train",), per_class=200)
        manifest = layouts.scan(put(str(tmp_path), webdataset(many, shard_size=1000)))["train"]
        spans, _ = self.fetched(manifest, 2**30, monkeypatch)
        whole = sum(span.end - span.start for span in spans)
        total = 0
        for rank in range(3):
            spans, _ = self.fetched(manifest, 2**30, monkeypatch, rank, 3)
            total += sum(span.end - span.start for span in spans)
        assert total < 1.1 * whole

    def test_memory_stays_within_the_budget(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(manifests, "BLOCK_BYTES", 100_000)
        many = little_set(("train",), per_class=400, size_px=(64, 64))
        manifest = layouts.scan(put(str(tmp_path), webdataset(many, shard_size=2000)))["train"]
        size_bytes = int(manifest.length.sum())
        budget_bytes = size_bytes // 20
        batch_bytes = BATCH * size_bytes // len(manifest)
        _, most = self.fetched(manifest, budget_bytes, monkeypatch)
        assert budget_bytes / 4 < most <= budget_bytes + 2 * batch_bytes

    def test_a_resumed_epoch_reads_only_what_is_left(self, manifest, monkeypatch) -> None:
        whole, _ = self.fetched(manifest, 2**30, monkeypatch)
        rest, _ = self.fetched(manifest, 2**30, monkeypatch, first=4)
        size = [sum(span.end - span.start for span in spans) for spans in (whole, rest)]
        assert size[1] < 0.5 * size[0]

    @pytest.mark.parametrize("first", [1, 2, 4])
    def test_the_first_batch_of_a_resumed_run_costs_no_more(
        self, manifest, monkeypatch, first: int
    ) -> None:
        """Than that of a start, in bytes: though all blocks that are mixed are begun by then."""
        start = self.bytes_before_a_batch(manifest, 0, monkeypatch)
        assert self.bytes_before_a_batch(manifest, first, monkeypatch) <= 1.2 * start

    def bytes_before_a_batch(self, manifest: Manifest, first: int, monkeypatch) -> int:
        share = TrainShare(order(manifest), 0, 1, 1)
        assert first < len(share)
        wanted = BatchRange(0, first, len(share), 1)
        mixed_bytes = share.order.mixed_bytes
        fetcher = Fetcher(manifest, manifest.blocks(), share, wanted, 2**30, mixed_bytes)
        begin, spans = fetcher._reads.begin, []
        monkeypatch.setattr(
            fetcher._reads, "begin", lambda span: (spans.append(span), begin(span))[1]
        )
        next(iter(fetcher))
        fetcher.close()
        return sum(span.end - span.start for span in spans)

    def test_single_files_are_read_when_they_are_needed(self, files, tmp_path, monkeypatch) -> None:
        manifest = layouts.scan(put(str(tmp_path), files))["train"]
        spans, most = self.fetched(manifest, 2**30, monkeypatch)
        assert len(spans) == 5 * BATCH
        assert most <= 9 * BATCH * int(manifest.length.max())

    def test_what_has_come_does_not_wait_for_the_rest(self, files, tmp_path, monkeypatch) -> None:
        manifest = layouts.scan(put(str(tmp_path), files))["train"]
        share = TrainShare(order(manifest), 0, 1, 1)
        wanted = BatchRange(0, 0, 1, 1)
        fetcher = Fetcher(manifest, manifest.blocks(), share, wanted, 2**30, 0)
        under_way: list[Future] = []
        monkeypatch.setattr(
            fetcher._reads, "begin", lambda span: (under_way.append(Future()), under_way[-1])[1]
        )
        batch = next(iter(fetcher))
        assert len(under_way) == BATCH
        for row in reversed(range(BATCH)):
            image = bytes(manifest.length[batch.ids[row]])
            under_way[row].set_result(image)
            assert next(batch.samples) == (row, image)
        assert next(batch.samples, None) is None
        fetcher.close()


class TestBlockCache:
    """What a cache saves, counted by the server's side of a proxy."""

    @pytest.fixture
    def remote(self, s3: S3Server, files: Files) -> Manifest:
        root = put(s3.url("cached"), webdataset(files, shard_size=50))
        return replace(layouts.scan(root)["train"], scan_id="a run's")

    @pytest.fixture(autouse=True)
    def of_this_test(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("LIGHTSHIP_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache" / "blocks"

    def reads(self, s3: S3Server, split: StreamedSplit, places, **options) -> tuple[Pixels, int]:
        """The batches, and how many GETs they took."""
        with FaultProxy(s3.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            return stream(split, places, **options), proxy.requests["GET"]

    def stored(self, folder: Path, count: int) -> list[Path]:
        """The files of the cache, once there are as many: the worker stores behind the reader."""
        for _ in range(300):
            if len(files := sorted(folder.glob("*/[!.]*"))) >= count:
                return files
            time.sleep(0.1)
        pytest.fail(f"{len(files)} of {count} blocks were stored within 30 s")

    def test_a_later_epoch_and_a_later_run_ask_for_nothing(
        self, s3: S3Server, remote: Manifest, of_this_test: Path
    ) -> None:
        split = streamed(remote, cache_bytes=2**30)
        blocks = remote.blocks().count
        first, gets = self.reads(s3, split, PLACES)
        assert first == resident(remote, PLACES)
        assert blocks <= gets <= blocks + len(remote.files), "two epochs for one"
        self.stored(of_this_test, gets)
        for rank in (0, 1):
            again, gets = self.reads(s3, split, PLACES, rank=rank, world_size=2)
            assert gets == 0, "whatever part of the blocks a rank needs"
            assert again[1, 2] == first[1, 2][12 * rank : 12 * rank + 12]

    def test_objects_without_checksums_are_cached_for_their_run_alone(
        self, s3: S3Server, of_this_test: Path, tmp_path: Path
    ) -> None:
        """Another run may come after one was overwritten, by one of the same length."""
        content = little_set(("train",), per_class=40, image_format="bmp")
        assert len(set(map(len, content.values()))) == 1
        root = put(s3.url("overwritten"), content)
        config = DataConfig(root=root, val_fraction=0, cache_gib=1)

        def batches(output: str | None) -> tuple[Pixels, int]:
            train = load_splits(config, output and str(tmp_path / output), "train")["train"]
            return self.reads(s3, streamed(train, cache_bytes=2**30), PLACES)

        first, gets = batches("run")
        self.stored(of_this_test, gets)
        names = sorted(content)
        content.update(zip(names, [content[name] for name in reversed(names)], strict=True))
        put(root, content)
        assert batches("run") == (first, 0), "a restart goes on with the same bytes"
        again, gets = batches("another")
        assert again == resident(layouts.scan(root)["train"], PLACES) != first
        assert gets > 0
        uncached = batches(None)
        assert uncached == batches(None), "beside no run they are read each time"
        assert uncached[1] > gets

    def test_damage_is_noticed_and_read_anew(
        self, s3: S3Server, remote: Manifest, of_this_test: Path
    ) -> None:
        split = streamed(remote, cache_bytes=2**30)
        expected, gets = self.reads(s3, split, PLACES)
        kept = self.stored(of_this_test, gets)
        kept[0].write_bytes(b"")
        data = bytearray(kept[1].read_bytes())
        data[len(data) // 2] ^= 1
        kept[1].write_bytes(bytes(data))
        got, gets = self.reads(s3, split, PLACES)
        assert got == expected
        assert gets == 2

    def test_size_is_bounded_and_the_least_used_go(self, tmp_path: Path) -> None:
        cache = BlockCache(tmp_path / "c", 10_000, "set")
        spans = [storage.Span("s3://b/k", i, i + 1000) for i in range(30)]
        for number, span in enumerate(spans):
            cache.store(span, bytes([number]) * 1000)
            os.utime(cache._path(span), (number, number))
            assert cache.load(spans[0]) == bytes(1000), "used all the time"
        held = [number for number, span in enumerate(spans) if cache.load(span)]
        assert held[0] == 0
        assert held[1:] == list(range(30 - len(held) + 1, 30))
        assert 7 <= len(held) <= 10

    def test_another_set_under_the_same_name_is_another(self, tmp_path: Path) -> None:
        span = storage.Span("s3://b/k", 0, 4)
        BlockCache(tmp_path, 2**20, "before").store(span, b"last")
        assert BlockCache(tmp_path, 2**20, "before").load(span) == b"last"
        assert BlockCache(tmp_path, 2**20, "after").load(span) is None

    def test_the_bound_is_that_of_all_ranks_of_a_node(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
        ranks = [BlockCache(tmp_path, 100_000, "set") for _ in range(8)]
        most = 0
        for number in range(400):
            span = storage.Span("s3://b/k", number, number + 1000)
            ranks[number % 8].store(span, bytes(1000))
            most = max(most, sum(path.stat().st_size for path in tmp_path.glob("*/*")))
        assert 75_000 < most <= 100_000

    def test_stores_behind_a_slow_disk_are_bounded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What finds no place in the queue is not stored, and not kept either."""
        monkeypatch.setattr(cache_module, "_QUEUE_BYTES", 10_000)
        is_fast = threading.Event()

        class SlowDisk(BlockCache):
            def store(self, span: storage.Span, data: bytes) -> None:
                assert is_fast.wait(30)
                super().store(span, data)

        (tmp_path / "file").write_bytes(bytes(100_000))
        spans = [storage.Span(str(tmp_path / "file"), i, i + 1000) for i in range(50)]
        reads = CachedReads(ReadAhead(), SlowDisk(tmp_path / "cache", 2**30, "set"))
        for future in [reads.begin(span) for span in spans]:
            assert reads.result(future) == bytes(1000)
        assert len(reads._under_way) <= 10
        is_fast.set()
        reads._storing.shutdown()
        assert len(list((tmp_path / "cache").glob("*/*"))) == 10
        reads.close()

    @pytest.mark.parametrize("failure", ["no folder", "no writing", "no reading"])
    def test_a_disk_that_fails_turns_it_off_with_a_line(
        self, s3: S3Server, remote: Manifest, of_this_test: Path, failure: str, caplog
    ) -> None:
        """As a full one, or one that is mounted read-only: an OSError at the first use."""
        split = streamed(remote, cache_bytes=2**30)
        of_this_test.parent.mkdir()
        if failure == "no folder":
            of_this_test.write_bytes(b"")
        elif failure == "no writing":
            of_this_test.mkdir()
            for number in range(256):
                (of_this_test / f"{number:02x}").write_bytes(b"")
        else:
            _, gets = self.reads(s3, split, PLACES)
            for path in self.stored(of_this_test, gets):
                path.unlink()
                path.mkdir()
        got, gets = self.reads(s3, split, PLACES)
        assert got == resident(remote, PLACES)
        assert gets > 0
        assert caplog.text.count("block cache off") == 1
        assert caplog.record_tuples[0][:2] == (cache_module.__name__, logging.WARNING)


class TestBadSamples:
    def spoilt(self, folder: Path, files: Files) -> tuple[Manifest, dict[int, str]]:
        """A folder some of whose files have gone bad, and the word that tells of each."""
        manifest = layouts.scan(put(str(folder), files))["train"]
        told = {3: "empty", 17: "truncated", 40: "not found", 77: "no image"}
        path = {i: folder / manifest.name(i) for i in told}
        path[3].write_bytes(b"")
        path[17].write_bytes(path[17].read_bytes()[:40])
        path[40].unlink()
        path[77].write_bytes(b"x" * int(manifest.length[77]))
        return manifest, told

    def test_skip_counts_each_and_leaves_the_others_as_they_were(self, files, tmp_path) -> None:
        whole = layouts.scan(put(str(tmp_path / "whole"), files))["train"]
        manifest, told = self.spoilt(tmp_path / "spoilt", files)
        split = streamed(manifest, most=0.1)
        # All that comes in an epoch and is not dropped at its end.
        expected, got = stream(streamed(whole), PLACES), stream(split, PLACES)
        for place in PLACES:
            for before, after in zip(expected[place], got[place], strict=True):
                assert after[0] == before[0]
                if after[0] in told:
                    assert after[1] == NOT_COUNTED
                else:
                    assert after == before
        assert set(split.bad.reasons) == set(told)

    @pytest.mark.parametrize("layout", ["folder", "tar"])
    def test_raise_names_the_sample(self, layout: str, files: Files, tmp_path: Path) -> None:
        content, name = LAYOUTS[layout](files)
        manifest = layouts.scan(storage.join(put(str(tmp_path), content), name))["train"]
        path = tmp_path / (manifest.files[manifest.file_index[9]] or name)
        if layout == "folder":
            path.write_bytes(b"x" * 200)
        else:
            data = bytearray(path.read_bytes())
            at = int(manifest.offset[9])
            data[at : at + 20] = b"x" * 20
            path.write_bytes(bytes(data))
        with pytest.raises(DataError) as error:
            stream(streamed(manifest), PLACES)
        assert manifest.name(9) in str(error.value)
        assert "--data.on_error skip" in str(error.value)

    def test_a_wrong_checksum(self, manifest: Manifest) -> None:
        manifest.crc32[:] = -1
        manifest.crc32[50] = 1
        with pytest.raises(DataError, match=r"checksum"):
            stream(streamed(manifest), PLACES)

    def test_too_many(self, files: Files, tmp_path: Path) -> None:
        manifest, _ = self.spoilt(tmp_path, files)
        with pytest.raises(DataError, match=r"max_bad_fraction"):
            stream(streamed(manifest, most=0.01), PLACES)

    def test_a_size_that_differs_needs_image_size_px(self, files: Files, tmp_path: Path) -> None:
        odd = little_set(("train",), per_class=1, size_px=(9, 9))
        content = {**files, "train/ant/005.png": odd["train/ant/000.png"]}
        manifest = layouts.scan(put(str(tmp_path), content))["train"]
        with pytest.raises(Exception, match=r"005\.png.*--data\.image_size_px") as error:
            stream(streamed(manifest, most=0.5), PLACES)
        assert error.value.exit_name == "data"  # type: ignore[attr-defined]


def test_sizes_follow_the_epochs_wherever_reading_starts(manifest: Manifest) -> None:
    sizes, places = SizeSchedule([4, 6], epochs=3), [(e, b) for e in range(3) for b in range(5)]
    found = stream(streamed(manifest), places, epochs=3, min_area=0.3, sizes=sizes)
    for epochs, size_px in (([0], 4), ([1, 2], 6)):
        split = streamed(manifest)
        alone = replace(split, decoder=replace(split.decoder, size_px=size_px))
        these = [place for place in places if place[0] in epochs]
        expected = stream(alone, these, epochs=3, min_area=0.3)
        assert {place: found[place] for place in these} == expected
    later = places[3:]  # within the last epoch of the first size
    resumed = stream(streamed(manifest), later, epochs=3, min_area=0.3, sizes=sizes)
    assert resumed == {place: found[place] for place in later}


def endless(manifest: Manifest, split: StreamedSplit | None = None) -> StreamedTrainLoader:
    where = iter([(epoch, batch) for epoch in range(99) for batch in range(5)])
    return StreamedTrainLoader(
        split or streamed(manifest), TrainShare(order(manifest), 0, 1, 1), Augment(0), 0.0,
        lambda: BatchRange(*next(where), batches_per_epoch=5, epochs=99),
    )  # fmt: skip


def test_a_frozen_worker_is_noticed(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = endless(manifest)
    batches = iter(loader)
    next(batches)
    worker = Worker.start(manifest.root)
    os.kill(worker.process.pid, signal.SIGSTOP)
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "1")
    try:
        with pytest.raises(TimeoutExpired, match=r"no batch within 2 s .*DEADLINE_S"):
            list(batches)
    finally:
        os.kill(worker.process.pid, signal.SIGCONT)
        loader.close()
        Worker.stop()


def resident_mib(pid: int, which: str) -> float:
    """VmRSS (now) or VmHWM (at most so far) of a process, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(which)]
    return int(line.split()[1]) / 1024


def test_a_worker_keeps_nothing_of_what_it_has_delivered(tmp_path: Path) -> None:
    """Of a set 20 times as large as the budget, read twice, the worker keeps nothing.

    That the reads ahead stay within the budget is counted by `TestFetching`.
    """
    large = little_set(("train",), per_class=220, size_px=(408, 408), image_format="ppm")
    manifest = layouts.scan(put(str(tmp_path), webdataset(large, shard_size=400)))["train"]
    budget_mib = 16
    assert manifest.length.sum() / 2**20 > 19 * budget_mib
    Worker.stop()
    split = streamed(manifest, budget_mib * 2**20)
    split = replace(split, decoder=replace(split.decoder, resize=DEFAULT_RESIZE))
    share = TrainShare(order(manifest, batch_size=6), 0, 1, 1)
    where = iter([(epoch, batch) for epoch in range(2) for batch in range(len(share))])
    loader = StreamedTrainLoader(
        split, share, Augment(0), 0.0,
        lambda: BatchRange(*next(where), batches_per_epoch=len(share), epochs=2),
    )  # fmt: skip
    batches, pid = iter(loader), Worker.start("").process.pid
    next(batches)
    before_mib = resident_mib(pid, "VmRSS")
    for _ in range(2 * len(share) - 1):
        next(batches)
    more_mib = resident_mib(pid, "VmHWM") - before_mib
    loader.close()
    assert more_mib < 2.5 * budget_mib, "beside the budget: decoding, and what malloc keeps"


def held(pid: int) -> tuple[int, int, int]:
    """Threads, file descriptors and mappings of shared memory of a process."""
    process = Path(f"/proc/{pid}")
    mapped = process.joinpath("maps").read_text().count("lightship-batches")
    threads, descriptors = (len(os.listdir(process / name)) for name in ("task", "fd"))
    return threads, descriptors, mapped


def wait_until_held(pid: int, most: tuple[float, ...]) -> None:
    """Its threads end a moment after a task has."""
    until = time.monotonic() + 20
    while any(now > bound for now, bound in zip(held(pid), most, strict=True)):
        assert time.monotonic() < until, f"{held(pid)} is held, more than {most}"
        time.sleep(0.05)


@pytest.mark.parametrize("batches", [1, 5], ids=["left early", "to its end"])
def test_a_worker_keeps_nothing_of_a_task_that_has_ended(
    manifest: Manifest, batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass of a validation is a task of the same worker."""
    monkeypatch.setenv("LIGHTSHIP_CACHE", str(tmp_path / "cache"))
    Worker.stop()
    split, share = streamed(manifest, cache_bytes=2**30), EvalShare(len(manifest), 24, 0, 1)
    assert len(share) == 5

    def evaluate() -> None:
        passing = iter(StreamedEvalLoader(split, share))
        for _ in range(batches):
            next(passing)
        passing.close()  # type: ignore[attr-defined]

    evaluate()
    ours, pid = os.getpid(), Worker.start("").process.pid
    wait_until_held(pid, (math.inf, math.inf, 0))
    first = held(pid)
    here = held(ours)
    for _ in range(5):
        evaluate()
    wait_until_held(pid, first)
    wait_until_held(ours, here)
    assert Worker.start("").process.pid == pid
    Worker.stop()


def test_relative_paths_are_seen_from_where_the_process_is_now(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after os.chdir in a notebook: the worker outlives a run."""
    for folder in ("a", "b"):
        put(str(tmp_path / folder / folder), files)
        monkeypatch.chdir(tmp_path / folder)
        manifest = layouts.scan(folder)["train"]
        assert stream(streamed(manifest), PLACES[:1]) == resident(manifest, PLACES[:1])


def test_an_absolute_root_is_read_from_a_directory_that_was_deleted(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = layouts.scan(put(str(tmp_path / "images"), files))["train"]
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    assert stream(streamed(manifest), PLACES[:1]) == resident(manifest, PLACES[:1])


def test_a_task_leaves_the_settings_of_those_beside_it(
    s3: S3Server, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = layouts.scan(put(s3.url("beside"), files))["train"]
    share = TrainShare(order(manifest), 0, 1, 1)
    places = iter(PLACES)
    loader = StreamedTrainLoader(
        streamed(manifest, budget_bytes=1), share, Augment(0), 0.0,
        lambda: BatchRange(*next(places), batches_per_epoch=len(share), epochs=2),
    )  # fmt: skip
    with FaultProxy(s3.endpoint) as ours, FaultProxy(s3.endpoint) as others:
        monkeypatch.setenv("AWS_ENDPOINT_URL", ours.endpoint)
        batches = iter(loader)
        next(batches)
        first = Worker.start(manifest.root).process
        monkeypatch.setenv("AWS_ENDPOINT_URL", others.endpoint)
        assert list(StreamedEvalLoader(streamed(manifest), EvalShare(len(manifest), 32, 0, 1)))
        before = ours.requests["GET"], others.requests["GET"]
        assert before[1] >= len(manifest)
        for _ in PLACES[1:]:
            next(batches)
        assert others.requests["GET"] == before[1]
        assert ours.requests["GET"] > before[0]
        loader.close()
    assert first.wait(30) == 0, "a worker of other settings ends with its last task"


def test_no_root_is_shown_to_who_lists_processes() -> None:
    Worker.stop()
    worker = Worker.start("http://127.0.0.1:9/set?X-Amz-Signature=very-secret")
    until, command = time.monotonic() + 30, b""
    while b"lightship.data.streaming.worker" not in command:
        assert time.monotonic() < until
        command = Path(f"/proc/{worker.process.pid}/cmdline").read_bytes()
    assert b"very-secret" not in command
    Worker.stop()


def test_a_worker_has_the_secrets_of_its_storage_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = (
        "WANDB_API_KEY", "LIGHTSHIP_RENDEZVOUS_SECRET", "GITHUB_PAT", "DATABASE_URL", "PASSWORD",
        "TORCHELASTIC_RUN_ID", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY",
        "AZURE_STORAGE_KEY",
    )  # fmt: skip
    for name in secrets:
        monkeypatch.setenv(name, "very-secret")
    found = []
    for root in ("/", "hf://datasets/a/b"):
        worker = Worker.start(root)
        environment, until = "", time.monotonic() + 30
        while not environment:  # just after its exec
            assert time.monotonic() < until
            environment = Path(f"/proc/{worker.process.pid}/environ").read_text()
        given = environment.split("\0")
        found.append({line.partition("=")[0] for line in given if line.endswith("=very-secret")})
        assert f"PATH={os.environ['PATH']}" in given
    storages = {"AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_KEY"}
    assert found == [storages, {*storages, "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}]
    Worker.stop()


def test_a_worker_ends_with_its_owner(tmp_path: Path) -> None:
    code = (
        "import os, time\n"
        "from lightship.data.streaming.worker_process import Worker\n"
        "print(Worker.start('/').process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        worker = int(owner.stdout.readline())
        os.kill(worker, 0)
        owner.kill()
    until = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < until, "it lives on"
        time.sleep(0.05)


def test_the_cache_removes_only_its_own_files_and_follows_no_link(tmp_path: Path) -> None:
    """Its folder may be one that others write to (LIGHTSHIP_CACHE)."""
    victim = tmp_path / "victim"
    victim.mkdir()
    own, others = "a" * 32, ["b" * 32, "notes.txt"]
    for name in (own, *others):
        (victim / name).write_bytes(bytes(4000))
    (tmp_path / "cache" / "aa").mkdir(parents=True)
    (tmp_path / "cache" / "aa" / own).write_bytes(bytes(4000))
    (tmp_path / "cache" / "aa" / "notes.txt").write_bytes(bytes(4000))
    (tmp_path / "cache" / "bb").symlink_to(victim)
    cache = BlockCache(tmp_path / "cache", 5000, "x")
    cache.store(storage.Span("memory://x", 0, 1000), bytes(1000))
    assert sorted(path.name for path in victim.iterdir()) == sorted([own, *others])
    assert [path.name for path in (tmp_path / "cache" / "aa").iterdir()] == ["notes.txt"]
    (tmp_path / "cache" / ".clearing").unlink()
    (tmp_path / "cache" / ".clearing").symlink_to(victim / "notes.txt")
    for i in range(9):
        cache.store(storage.Span("memory://x", i, 1000), bytes(1000))
    assert (victim / "notes.txt").stat().st_size == 4000
    assert cache.is_off
