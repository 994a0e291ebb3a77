"""Random numbers as a pure function of (seed, epoch, sample id), on the host, without torch.

`augment.uniform` gives the same ones on a device: both are `hashed`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 9
"""Draws of a sample that augmentation uses."""
FLIP = 2
"""The one that decides whether it is mirrored."""


@dataclass(frozen=True)
class Mirror:
    """Which images are mirrored: half of them in each epoch.

    Attributes:
        seed: The run's seed.
        in_turn: See `Augment.flip_in_turn`.
    """

    seed: int
    in_turn: bool = False

    def mirrored(self, ids: np.ndarray, epoch: int) -> np.ndarray:
        """[B] bool: which of the samples `ids` [B] int64 are mirrored in an epoch."""
        drawn = uniform(ids, self.seed, 0 if self.in_turn else epoch)[:, FLIP] < 0.5
        return drawn ^ (epoch % 2 == 1) if self.in_turn else drawn


def uniform(ids: np.ndarray, seed: int, epoch: int, draws: int = DRAWS) -> np.ndarray:
    """`draws` independent numbers in [0, 1) for each of `ids` [B] int64, [B, draws] float32."""
    counter = ids[:, None] * draws + np.arange(draws)
    return hashed(counter, seed, epoch, np.right_shift).astype(np.float32) * np.float32(2.0**-24)


def hashed(counter: Any, seed: int, epoch: int, shift: Callable[[Any, int], Any]) -> Any:
    """24 random bits for each number of `counter`, an int64 array or tensor.

    SplitMix64's finaliser (Steele et al. 2014, "Fast splittable pseudorandom number generators")
    over a counter made of the id, the draw, the epoch and the seed.

    Args:
        counter: Numbers of the draws.
        seed: The run's seed.
        epoch: Of the draws.
        shift: The array library's right shift, arithmetic or not.
    """

    def shifted(bits: Any, places: int) -> Any:
        return shift(bits, places) & ((1 << (64 - places)) - 1)

    key = int(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw()) >> 1
    bits = counter * -7046029254386353131 + key  # 0x9E3779B97F4A7C15, the golden ratio
    bits = (bits ^ shifted(bits, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    bits = (bits ^ shifted(bits, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return shifted(bits ^ shifted(bits, 31), 40)
