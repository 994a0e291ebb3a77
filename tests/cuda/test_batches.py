"""Batches on the device are, pixel for pixel, those of the CPU."""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lightship import devices
from lightship.data.augment import Augment
from lightship.data.bad_samples import BadSamples
from lightship.data.batch import Batch
from lightship.data.manifest import Manifest
from lightship.data.order_versions import order_of
from lightship.data.resident import ResidentEvalLoader, ResidentSplit, ResidentTrainLoader
from lightship.data.sample_decoder import SampleDecoder, decode_all
from lightship.data.shares import EvalShare, TrainShare
from lightship.data.sources import layouts
from lightship.data.streaming.loaders import StreamedSplit, StreamedTrainLoader
from lightship.data.streaming.prefetch import BatchRange
from tests.support.images import little_set, put

CPU = torch.device("cpu")
SIZE_PX, BATCH, SEED = 48, 32, 3
BATCHES = 24
"""Of which a worker's four slots are used six times each."""
AUGMENT = {
    "plain": Augment(SEED),
    "crop, flip, cutout": Augment(SEED, crop_padding_px=4, flip=True, cutout_px=9),
    "alternating flip": Augment(SEED, flip=True, flip_in_turn=True),
    "mixup and cutmix": Augment(SEED, mixup_alpha=0.3, cutmix_alpha=1.0),
}
CYCLES = 20_000_000
"""Of a GPU's clock, 10 ms: longer than the copies of all slots take."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    files = little_set(("train",), per_class=90, size_px=(SIZE_PX, SIZE_PX))
    return layouts.scan(put(str(tmp_path_factory.mktemp("images")), files))["train"]


def share_of(manifest: Manifest) -> TrainShare:
    return TrainShare(order_of(manifest, BATCH, SEED), rank=0, world_size=1, parts=1)


def resident_split(manifest: Manifest, device: torch.device) -> ResidentSplit:
    images, _ = decode_all(manifest)
    is_bad = np.zeros(len(manifest), dtype=bool)
    return ResidentSplit.from_arrays(images, manifest.label, is_bad, device)


def resident(manifest: Manifest, augment: Augment, device: torch.device) -> list[Batch]:
    share, done = share_of(manifest), iter(range(BATCHES))
    split = resident_split(manifest, device)
    loader = ResidentTrainLoader(split, share, augment, lambda: divmod(next(done), len(share)))
    return taken(iter(loader), lambda: None)


def streamed(
    manifest: Manifest, augment: Augment, device: torch.device, before_each: Callable[[], None]
) -> list[Batch]:
    share, done = share_of(manifest), iter(range(BATCHES))
    bad = BadSamples(manifest, len(manifest), None)
    split = StreamedSplit(SampleDecoder(manifest, SIZE_PX), 2, 2**28, 0, bad, device)

    def wanted() -> BatchRange:
        epoch, batch = divmod(next(done), len(share))
        return BatchRange(epoch, batch, batches_per_epoch=len(share), epochs=None)

    loader = StreamedTrainLoader(split, share, augment, 0.0, wanted)
    try:
        return taken(iter(loader), before_each)
    finally:
        loader.close()


def taken(batches: Iterator[Batch], before_each: Callable[[], None]) -> list[Batch]:
    """All batches, kept on their device; a CPU's are copied, as its slots are used again."""
    kept = []
    for _ in range(BATCHES):
        before_each()
        batch = next(batches)
        if batch.images.device == CPU:
            batch = batch._replace(images=batch.images.clone())
        kept.append(batch)
    return kept


def assert_equal(found: list[Batch], expected: list[Batch], device: torch.device) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.images.device == device
        for name, theirs in other._asdict().items():
            ours = getattr(one, name)
            if theirs is None or not theirs.is_floating_point():
                assert (ours is None) == (theirs is None), name
                assert theirs is None or torch.equal(ours.cpu(), theirs), name
            else:  # blended pixels: the last bit of a product and a sum may differ
                torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", AUGMENT)
def test_resident_batches_are_those_of_the_cpu(
    name: str, manifest: Manifest, device: torch.device
) -> None:
    expected = resident(manifest, AUGMENT[name], CPU)
    assert_equal(resident(manifest, AUGMENT[name], device), expected, device)


def test_resident_evaluation_is_that_of_the_cpu(manifest: Manifest, device: torch.device) -> None:
    share = EvalShare(len(manifest), 64, 0, 1)
    expected, found = (
        list(ResidentEvalLoader(resident_split(manifest, each), share)) for each in (CPU, device)
    )
    assert_equal(found, expected, device)


@pytest.mark.parametrize("name", ["plain", "crop, flip, cutout"])
def test_streamed_batches_are_those_of_the_cpu_however_late_they_are_copied(
    name: str, manifest: Manifest, device: torch.device
) -> None:
    """The device is busy when each copy is asked for; slots are used again when it is done."""
    expected = resident(manifest, AUGMENT[name], CPU)
    busy = device.type == "cuda"
    delay = (lambda: torch.cuda._sleep(CYCLES)) if busy else (lambda: None)
    assert_equal(streamed(manifest, AUGMENT[name], device, delay), expected, device)


def test_a_slot_is_lent_until_its_copy_is_done(device: torch.device) -> None:
    slots = torch.zeros((2, 4, SIZE_PX, SIZE_PX, 3), dtype=torch.uint8)
    uploads = devices.of(device).uploads(slots)
    slots[1] = 7
    if device.type == "cuda":
        assert uploads.is_pinned, "cudaHostRegister failed"
        torch.cuda._sleep(10 * CYCLES)
    (moved,), copied = uploads.begin(slots[1])
    if device.type == "cuda":
        assert not copied.query(), "the copy cannot be done yet"
        copied.synchronize()
    slots[1] = 9
    assert moved.device == device
    if device.type == "cuda":  # on a CPU it is the slot itself
        assert bool((moved == 7).all())
    uploads.close()
    (again,), _ = devices.of(device).uploads(slots).begin(slots[1])  # it can be pinned once more
    assert bool((again == 9).all())


TOY = textwrap.dedent("""
    import torch
    from lightship import devices
    slots = (torch.arange(4 * 1000) % 256).to(torch.uint8).reshape(4, 1000)
    device = torch.device("cuda", 0)
    uploads = devices.of(device).uploads(slots)
    assert uploads.is_pinned
    sums = []
    for slot in range(4):
        (moved,), copied = uploads.begin(slots[slot])
        sums.append(moved.sum())
        copied.synchronize()
        slots[slot] = 0
    print([int(each) for each in sums])
    uploads.close()
""")


@pytest.mark.only_cuda("a tool for CUDA programs")
@pytest.mark.parametrize("tool", ["torch", "memcheck"])
def test_sanitizers_find_nothing_in_the_uploads(tool: str, tmp_path: Path) -> None:
    """torch's sanitizer looks for races between streams, NVIDIA's for bad addresses."""
    command, more = [sys.executable, "-c", TOY], {"TORCH_CUDA_SANITIZER": "1"}
    if tool == "memcheck":
        found = shutil.which("compute-sanitizer")
        if found is None:
            pytest.skip("compute-sanitizer is not on the PATH")
        command, more = [found, "--tool=memcheck", "--error-exitcode=9", *command], {}
    try:
        done = subprocess.run(
            command, env=os.environ | more, capture_output=True, text=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool}: the toy takes longer than 60 s under it")
    said = done.stdout + done.stderr
    if "not supported" in said.lower():
        pytest.skip(f"{tool} does not support this device: {said.strip().splitlines()[0]}")
    assert done.returncode == 0, said
    assert str([sum(i % 256 for i in range(k * 1000, k * 1000 + 1000)) for k in range(4)]) in said
