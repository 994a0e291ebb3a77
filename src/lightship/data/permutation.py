"""Keyed permutations of range(N), of which any element is computed alone."""

import math
from collections.abc import Callable

import numpy as np

_ROUNDS = 8
_WORD = np.uint64
_Pass = Callable[[np.ndarray, np.ndarray], np.ndarray]
_FIRST, _SECOND = _WORD(0xFF51AFD7ED558CCD), _WORD(0xC4CEB9FE1A85EC53)
_SHIFT, _HALF = _WORD(33), _WORD(32)


def words(count: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """[count] uint64 random bits, different for each stream.

    Raw Philox words, whose values NumPy guarantees, and not a `Generator`'s methods, whose streams
    may change between NumPy versions: a run must be resumable after an upgrade.
    """
    key = np.array([seed + (stream << 32), epoch], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit words that spreads every bit: MurmurHash3's finalizer (Appleby)."""
    values = (values ^ (values >> _SHIFT)) * _FIRST
    values = (values ^ (values >> _SHIFT)) * _SECOND
    return values ^ (values >> _SHIFT)


class Permutation:
    """A random permutation of range(size), in constant memory and time an element.

    The generalized Feistel cipher on Z_a x Z_b of Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains" (CT-RSA 2002), with a and b about the square root of the size, and their cycle walking:
    what falls beyond the size is permuted again until it does not, which few elements need, for
    a * b is less than size + a.

    Args:
        size: At most 2**62.
        seed: The run's seed.
        epoch: Selects the permutation, with `stream`.
        stream: Separates the permutations of one epoch.
    """

    def __init__(self, size: int, seed: int, epoch: int, stream: int) -> None:
        assert 0 < size <= 2**62, size
        self.size = size
        self._a = max(1, math.isqrt(size - 1) + 1)
        self._b = -(-size // self._a)
        keys = words(_ROUNDS + 1, seed, epoch, stream)
        self._keys, self._tweak_key = keys[:_ROUNDS], keys[_ROUNDS]

    def __call__(self, values: np.ndarray, tweaks: np.ndarray | None = None) -> np.ndarray:
        """Where `values` ([M] int64) go, [M] int64.

        Args:
            values: In range(size).
            tweaks: [M] int64: the elements of each value have a permutation of their own.
        """
        return self._walk(values, tweaks, self._forward)

    def inverse(self, values: np.ndarray, tweaks: np.ndarray | None = None) -> np.ndarray:
        """Where `values` come from; see `__call__`."""
        return self._walk(values, tweaks, self._backward)

    def _walk(self, values: np.ndarray, tweaks: np.ndarray | None, once: _Pass) -> np.ndarray:
        found = values.astype(_WORD)
        keys = self._tweaks(tweaks)
        found = once(found, keys)
        beyond = np.flatnonzero(found >= _WORD(self.size))
        while len(beyond):
            again = once(found[beyond], keys if keys.ndim == 0 else keys[beyond])
            found[beyond] = again
            beyond = beyond[again >= _WORD(self.size)]
        return found.astype(np.int64)

    def _tweaks(self, tweaks: np.ndarray | None) -> np.ndarray:
        if tweaks is None:
            return np.zeros((), dtype=_WORD)
        return mix(tweaks.astype(_WORD) + self._tweak_key)

    def _forward(self, values: np.ndarray, tweaks: np.ndarray) -> np.ndarray:
        right, left = np.divmod(values, _WORD(self._a))
        for number in range(0, _ROUNDS, 2):
            left = left + self._round(number, right, tweaks, self._a)
            left -= (left >= _WORD(self._a)) * _WORD(self._a)
            right = right + self._round(number + 1, left, tweaks, self._b)
            right -= (right >= _WORD(self._b)) * _WORD(self._b)
        return right * _WORD(self._a) + left

    def _backward(self, values: np.ndarray, tweaks: np.ndarray) -> np.ndarray:
        right, left = np.divmod(values, _WORD(self._a))
        for number in range(_ROUNDS - 2, -1, -2):
            right = right + _WORD(self._b) - self._round(number + 1, left, tweaks, self._b)
            right -= (right >= _WORD(self._b)) * _WORD(self._b)
            left = left + _WORD(self._a) - self._round(number, right, tweaks, self._a)
            left -= (left >= _WORD(self._a)) * _WORD(self._a)
        return right * _WORD(self._a) + left

    def _round(self, number: int, half: np.ndarray, tweaks: np.ndarray, end: int) -> np.ndarray:
        """Of each half a random number below `end` (of at most 2**32)."""
        return ((mix(half + tweaks + self._keys[number]) >> _HALF) * _WORD(end)) >> _HALF
