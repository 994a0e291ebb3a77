"""Augmentation: pure in (seed, epoch, id), right at the border, exact in its weights."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from lightship.data import draws as host
from lightship.data.augment import (
    Augment,
    beta_quantile,
    crop_and_flip,
    cutout,
    is_flipped,
    uniform,
)
from lightship.data.batch import Batch


def batch_of(ids: list[int], size: int = 8) -> Batch:
    pixels = torch.arange(3 * size * size).reshape(3, size, size)
    images = torch.stack([(pixels + 17 * index) % 256 for index in ids]).to(torch.uint8)
    return Batch(images, torch.tensor([index % 5 for index in ids]), torch.tensor(ids))


EVERYTHING = Augment(
    3, crop_padding_px=2, flip=True, cutout_px=3, mixup_alpha=0.3, cutmix_alpha=1.0
)


def test_draws_are_uniform_and_independent() -> None:
    draws = uniform(torch.arange(20_000), seed=1, epoch=0).double()
    assert draws.min() >= 0
    assert draws.max() < 1
    assert (draws.mean(0) - 0.5).abs().max() < 0.01
    assert (draws.var(0) - 1 / 12).abs().max() < 0.002
    correlation = torch.corrcoef(draws.T) - torch.eye(draws.shape[1])
    assert correlation.abs().max() < 0.03
    following = torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1]
    assert abs(following) < 0.03


def test_draws_are_fixed_for_good() -> None:
    """A run must be resumable by a later version: these numbers may never change."""
    drawn = uniform(torch.tensor([0, 1, 123456789]), seed=5, epoch=2, draws=2)
    expected = [
        [0.5356420874595642, 0.44226211309432983],
        [0.46480560302734375, 0.052111268043518066],
        [0.7909082770347595, 0.08690661191940308],
    ]
    torch.testing.assert_close(drawn, torch.tensor(expected), rtol=0, atol=0)


def test_the_host_draws_the_same() -> None:
    ids = torch.tensor([0, 1, 77, 123456789, 2**40])
    for seed, epoch in ((0, 0), (5, 3), (2**31 + 7, 1000)):
        np.testing.assert_array_equal(
            host.uniform(ids.numpy(), seed, epoch, 40), uniform(ids, seed, epoch, 40).numpy()
        )
        for in_turn in (False, True):
            there = Augment(seed, flip=True, flip_in_turn=in_turn).mirrored(ids, epoch)
            here = host.Mirror(seed, in_turn).mirrored(ids.numpy(), epoch)
            assert here.tolist() == there.tolist()


def test_a_sample_does_not_depend_on_its_batch() -> None:
    plain = Augment(3, crop_padding_px=2, flip=True, cutout_px=3)
    whole = plain(batch_of(list(range(16))), epoch=4)
    halves = [plain(batch_of(list(range(start, start + 8))), epoch=4) for start in (0, 8)]
    assert torch.equal(whole.images, torch.cat([half.images for half in halves]))


def test_pairs_are_the_same_on_any_world_size() -> None:
    whole = EVERYTHING(batch_of(list(range(16))), epoch=4)
    halves = [EVERYTHING(batch_of(list(range(start, start + 8))), epoch=4) for start in (0, 8)]
    for name in ("images", "mixed_labels", "mix_weight"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(h, name) for h in halves]))


def test_epochs_and_seeds_differ() -> None:
    batch = batch_of(list(range(16)))
    first = EVERYTHING(batch, 0).images
    assert not torch.equal(first, EVERYTHING(batch, 1).images)
    other = Augment(4, crop_padding_px=2, flip=True)
    assert not torch.equal(
        Augment(3, crop_padding_px=2, flip=True)(batch, 0).images, other(batch, 0).images
    )


def test_nothing_asked_changes_nothing() -> None:
    batch = batch_of([1, 2, 3])
    assert Augment(0)(batch, 0) is batch


def test_crop_and_flip_equals_pad_crop_mirror() -> None:
    """Against the plain way: torch's own reflect padding, slicing and flip, one image at a time."""
    batch, padding = batch_of(list(range(32)), size=9), 3
    draws = uniform(batch.ids, seed=0, epoch=0)
    got = crop_and_flip(batch.images, draws, padding, is_flipped(draws))
    padded = functional.pad(batch.images.float(), [padding] * 4, mode="reflect").to(torch.uint8)
    for index, (down, right, mirror) in enumerate(draws[:, :3].tolist()):
        top, left = int(down * 7), int(right * 7)
        expected = padded[index, :, top : top + 9, left : left + 9]
        if mirror < 0.5:
            expected = expected.flip(-1)
        assert torch.equal(got[index], expected), index


def test_cutout_greys_one_square() -> None:
    batch = batch_of(list(range(20)))
    images = torch.full_like(batch.images, 7)
    cut = cutout(images, uniform(batch.ids, 0, 0), 3)
    assert ((cut == 128).sum((1, 2, 3)) == 3 * 3 * 3).all()
    assert ((cut == 7) | (cut == 128)).all()


def test_mixup_blends_by_its_weight() -> None:
    batch = batch_of(list(range(8)))
    mixed = Augment(1, mixup_alpha=0.4)(batch, 0)
    partner = batch.images[[1, 0, 3, 2, 5, 4, 7, 6]].float()
    weight = mixed.mix_weight[:, None, None, None]
    torch.testing.assert_close(mixed.images, batch.images * weight + partner * (1 - weight))
    assert mixed.mixed_labels.tolist() == batch.labels[[1, 0, 3, 2, 5, 4, 7, 6]].tolist()


def test_cutmix_weight_is_the_share_of_pixels_kept() -> None:
    ids = list(range(64))
    images = torch.zeros(64, 3, 16, 16, dtype=torch.uint8)
    images[1::2] = 255
    mixed = Augment(1, cutmix_alpha=1.0)(
        Batch(images, torch.zeros(64).long(), torch.tensor(ids)), 0
    )
    kept = (mixed.images == images).float().mean((1, 2, 3))
    torch.testing.assert_close(mixed.mix_weight, kept)
    assert 0.3 < float(kept.mean()) < 0.9


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 3.0])
def test_beta_quantiles(alpha: float) -> None:
    """Against NumPy's sampler, at nine quantiles."""
    points = torch.linspace(0.1, 0.9, 9)
    drawn = np.random.default_rng(0).beta(alpha, alpha, 400_000)
    expected = np.quantile(drawn, points.numpy())
    np.testing.assert_allclose(beta_quantile(points, alpha).numpy(), expected, atol=0.006)


def test_augmentation_never_asks_the_device() -> None:
    batch = batch_of(list(range(16)))
    EVERYTHING(batch, 0)  # tables are made once
    with torch.profiler.profile() as profile:
        EVERYTHING(batch, 1)
    names = {event.key for event in profile.key_averages()}
    assert "aten::index" in names  # the profiler saw the work
    assert not names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::item"}


def test_in_turn_each_image_is_seen_both_ways_in_two_epochs() -> None:
    batch = batch_of(list(range(400)))
    augment = Augment(3, flip=True, flip_in_turn=True)
    seen = [augment(batch, epoch).images for epoch in range(4)]
    as_it_is = [(images == batch.images).all(dim=3).all(dim=2).all(dim=1) for images in seen]
    assert 150 < int(as_it_is[0].sum()) < 250
    assert torch.equal(as_it_is[1], ~as_it_is[0])
    assert torch.equal(seen[1][as_it_is[0]], batch.images.flip(3)[as_it_is[0]])
    assert torch.equal(seen[2], seen[0])
    assert torch.equal(seen[3], seen[1])
    some = batch_of([7, 300])
    assert torch.equal(augment(some, 2).images, seen[2][[7, 300]])


def test_in_turn_the_first_epoch_is_that_of_chance() -> None:
    batch = batch_of(list(range(50)))
    by_chance, in_turn = Augment(3, flip=True), Augment(3, flip=True, flip_in_turn=True)
    assert torch.equal(by_chance(batch, 0).images, in_turn(batch, 0).images)
    assert not torch.equal(by_chance(batch, 2).images, in_turn(batch, 2).images)
