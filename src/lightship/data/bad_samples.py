"""Samples that cannot be read: told of, counted, left out, or too many."""

from threading import Lock

from lightship.data.manifest import Manifest
from lightship.exits import DataError

_NAMED = 3


class BadSamples:
    """The samples that cannot be read: each is told of, left out or too many. For any thread.

    Args:
        manifest: The split.
        among: How many samples these are counted among.
        max_fraction: Largest share of them that may be bad; None: not one.
        flags: What the flags that set this begin with.

    Attributes:
        told: Sample -> its name, and why it cannot be read.
    """

    def __init__(
        self,
        manifest: Manifest,
        among: int,
        max_fraction: float | None,
        flags: str = "--data.",
    ) -> None:
        self.manifest, self.among, self.flags = manifest, among, flags
        self.max_fraction = max_fraction
        self.told: dict[int, str] = {}
        self._lock = Lock()

    def add(self, i: int, error: DataError) -> None:
        """Count sample `i`, once.

        Raises:
            DataError: It may not be left out, or too many (or all) have been.
        """
        name = self.manifest.name(i)
        told = str(error) if name in str(error) else f"{name}: {error}"
        if self.max_fraction is None:
            raise DataError(f"{told}; {self.flags}on_error skip leaves such images out") from error
        with self._lock:
            self.told[i] = told
            count = len(self.told)
        if count == self.among:
            raise DataError(f"none of {count} images can be read; the last: {told}") from error
        if count > self.max_fraction * self.among:
            raise DataError(
                f"at least {count} of {self.among} images are bad, more than "
                f"{self.flags}max_bad_fraction {self.max_fraction:g} allows; the last: {told}; "
                "remove them or raise that flag"
            ) from error

    def first_told(self) -> str:
        """The first few, for a line of a log."""
        named = "; ".join(list(self.told.values())[:_NAMED])
        return f"{named}; ..." if len(self.told) > _NAMED else named
