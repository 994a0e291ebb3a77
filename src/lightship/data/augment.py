"""Random augmentation of a batch on its device, each draw a function of (seed, epoch, sample id).

No random state is kept: a counter-based hash gives the same numbers on any device, world size and
after any restart. Every function has static shapes and needs no answer from the device.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightship.data.batch import Batch
from lightship.data.draws import DRAWS, FLIP, hashed

_TABLE_STEPS = 1024
_DY, _DX, _, _CUT_Y, _CUT_X, _PICK, _SHARE, _BOX_Y, _BOX_X = range(DRAWS)


@dataclass(frozen=True)
class Augment:
    """Training-time augmentation; a field that is 0 or False leaves that part out.

    Attributes:
        seed: The run's seed.
        crop_padding_px: Reflect-pad by this much on every side, then crop back at random.
        flip: Mirror half of the images.
        flip_in_turn: With `flip`: mirror an image every other epoch, half of them in the first
            (the alternating flip of Jordan 2024, arXiv:2404.00498). In two epochs each image is
            then seen both ways, where chance alone shows half of them one way twice.
        cutout_px: Side of a random grey square (DeVries & Taylor 2017, arXiv:1708.04552).
        mixup_alpha: Blend pairs with weight Beta(a, a) (Zhang et al. 2017, arXiv:1710.09412).
        cutmix_alpha: Exchange a box within pairs (Yun et al. 2019, arXiv:1905.04899). With both,
            each pair draws one of the two.
    """

    seed: int
    crop_padding_px: int = 0
    flip: bool = False
    flip_in_turn: bool = False
    cutout_px: int = 0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs (the device's batch must then be even)."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    def __call__(self, batch: Batch, epoch: int) -> Batch:
        """The batch as it is trained on in `epoch`.

        Args:
            batch: uint8 images [B, 3, H, W]. B is even if `mixes`.
            epoch: Epoch of the draws.
        """
        if not (self.crop_padding_px or self.flip or self.cutout_px or self.mixes):
            return batch
        draws = uniform(batch.ids, self.seed, epoch)
        images = batch.images
        if self.crop_padding_px or self.flip:
            mirror = self.mirrored(batch.ids, epoch, draws) if self.flip else None
            images = crop_and_flip(images, draws, self.crop_padding_px, mirror)
        if self.cutout_px:
            images = cutout(images, draws, self.cutout_px)
        batch = batch._replace(images=images)
        return self._mix(batch, draws) if self.mixes else batch

    def mirrored(self, ids: Tensor, epoch: int, draws: Tensor | None = None) -> Tensor:
        """[B] bool: which of the samples `ids` are mirrored; `draws` are theirs, if at hand."""
        if self.flip_in_turn:
            return is_flipped(uniform(ids, self.seed, 0)) ^ (epoch % 2 == 1)
        return is_flipped(uniform(ids, self.seed, epoch) if draws is None else draws)

    def _mix(self, batch: Batch, draws: Tensor) -> Batch:
        # Partners are neighbours (0-1, 2-3, ...): a rank's slice holds whole pairs, so pairs are
        # the same on any world size. The order is random already. Both use the first one's draws.
        draws = draws[0::2].repeat_interleave(2, 0)
        partner = batch.images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        partner_labels = batch.labels.unflatten(0, (-1, 2)).flip(1).flatten()
        pick_cut = draws[:, _PICK] < (0.5 if self.mixup_alpha else 1.0)
        if not self.cutmix_alpha:
            pick_cut = torch.zeros_like(pick_cut)
        images, weight = batch.images, torch.ones_like(draws[:, 0])
        if self.cutmix_alpha:
            keep = beta_quantile(draws[:, _SHARE], self.cutmix_alpha)
            box = _box(images, draws, (1 - keep).sqrt()) & pick_cut[:, None, None, None]
            images = torch.where(box, partner, images)
            weight = 1 - box.float().mean((1, 2, 3))
        if self.mixup_alpha:
            keep = beta_quantile(draws[:, _SHARE], self.mixup_alpha)
            keep = torch.where(pick_cut, torch.ones_like(keep), keep)
            share = keep[:, None, None, None]
            images = images.float() * share + partner.float() * (1 - share)
            weight = torch.where(pick_cut, weight, keep)
        return batch._replace(images=images, mixed_labels=partner_labels, mix_weight=weight)


def uniform(ids: Tensor, seed: int, epoch: int, draws: int = DRAWS) -> Tensor:
    """`draws` independent numbers in [0, 1) for each of `ids` [B] int64, [B, draws] float32.

    Those of `draws.uniform`, on the device of `ids`.
    """
    counter = ids[:, None] * draws + torch.arange(draws, device=ids.device)
    # Not `>>`: XLA (2.9) makes a division of it, which rounds negative numbers the other way.
    return hashed(counter, seed, epoch, torch.bitwise_right_shift).float() * 2.0**-24


def is_flipped(draws: Tensor) -> Tensor:
    """[B] bool from the draws of `uniform`: which images are mirrored."""
    return draws[:, FLIP] < 0.5


def crop_and_flip(images: Tensor, draws: Tensor, padding_px: int, mirror: Tensor | None) -> Tensor:
    """Shift each image by up to `padding_px` (reflected at the border), mirror those of `mirror`.

    Padding, cropping and flipping are one gather a dimension: no padded copy is made.
    """
    height, width = images.shape[-2:]
    span = 2 * padding_px + 1
    rows = torch.arange(height, device=images.device)[None, :]
    rows = rows + (draws[:, _DY, None] * span).long() - padding_px
    cols = torch.arange(width, device=images.device)[None, :]
    if mirror is not None:
        cols = torch.where(mirror[:, None], width - 1 - cols, cols)
    cols = cols + (draws[:, _DX, None] * span).long() - padding_px
    index = torch.arange(len(images), device=images.device)[:, None, None]
    # NHWC, so that one index moves a whole pixel.
    pixels = images.permute(0, 2, 3, 1)
    rows, cols = _reflect(rows, height), _reflect(cols, width)
    return pixels[index, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Positions outside [0, size) mirrored back in, the border not repeated (as torch's pad)."""
    last = size - 1
    return last - (last - position.abs()).abs()


def cutout(images: Tensor, draws: Tensor, size_px: int) -> Tensor:
    """Grey out (value 128) one square of side `size_px` inside each image."""
    height, width = images.shape[-2:]
    size_px = min(size_px, height, width)
    top = (draws[:, _CUT_Y] * (height - size_px + 1)).long()
    left = (draws[:, _CUT_X] * (width - size_px + 1)).long()
    hole = _between(top, top + size_px, height)[:, None, :, None]
    hole = hole & _between(left, left + size_px, width)[:, None, None, :]
    return images.masked_fill(hole, 128)


def _box(images: Tensor, draws: Tensor, side: Tensor) -> Tensor:
    """[B, 1, H, W] bool: a box of relative `side` about a random centre, cut at the border."""
    height, width = images.shape[-2:]
    masks = []
    for size, draw in ((height, _BOX_Y), (width, _BOX_X)):
        centre, half = draws[:, draw] * size, side * size / 2
        masks.append(_between((centre - half).round(), (centre + half).round(), size))
    return (masks[0][:, :, None] & masks[1][:, None, :])[:, None]


def _between(start: Tensor, stop: Tensor, size: int) -> Tensor:
    """[B, size] bool: start <= position < stop."""
    position = torch.arange(size, device=start.device)[None, :]
    return (position >= start[:, None]) & (position < stop[:, None])


def beta_quantile(probability: Tensor, alpha: float) -> Tensor:
    """Quantiles of Beta(alpha, alpha) at `probability` [B] float32, by table."""
    table = _beta_table(alpha, probability.device)
    lower = torch.minimum(probability, 1 - probability) * (2 * _TABLE_STEPS)
    left = lower.long().clamp(max=_TABLE_STEPS - 1)
    value = torch.lerp(table[left], table[left + 1], lower - left)
    return torch.where(probability < 0.5, value, 1 - value)


@functools.lru_cache(maxsize=8)
def _beta_table(alpha: float, device: torch.device) -> Tensor:
    """The lower half of the quantile function; the upper half is its mirror image.

    A table, and not a sampler: uniform draws stay the only source of randomness. Integrated after
    x = t**(1/alpha), which removes the density's pole at 0.
    """
    grid = np.linspace(0, 0.5**alpha, 8 * _TABLE_STEPS + 1)
    density = (1 - grid ** (1 / alpha)) ** (alpha - 1)
    mass = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    points = np.linspace(0, 1, _TABLE_STEPS + 1)
    quantiles = np.interp(points, mass / mass[-1], grid) ** (1 / alpha)
    return torch.tensor(quantiles, dtype=torch.float32, device=device)
