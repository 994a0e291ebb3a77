"""Repeats: whether a sequence goes round in a circle."""


class Repeats:
    """Finds any circle by keeping one value at a time (R. P. Brent, BIT 20, 1980)."""

    def __init__(self) -> None:
        self._count, self._kept, self._found = 0, "", False

    def has(self, value: str) -> bool:
        """Whether this next value, which is not empty, or one before it came a second time.

        It is seen after at most three rounds.
        """
        self._count += 1
        self._found |= value == self._kept
        if self._count & (self._count - 1) == 0:  # a power of two
            self._kept = value
        return self._found
