"""Samples that cannot be read: named, counted against the whole split, skipped, or too many."""

import functools
from collections.abc import Iterable, Mapping
from threading import Lock
from typing import Any, NamedTuple

from lightship.data.manifest import Manifest
from lightship.errors import ConfigError, DataError

_NAMED = 3


class News(NamedTuple):
    """What one rank has found since the ranks last compared their bad samples."""

    reasons: dict[int, str]
    """Sample -> its name, and why it cannot be read."""
    is_denied: bool
    """Whether access was denied to each of them."""


def reason(manifest: Manifest, i: int, error: DataError) -> str:
    """Why sample `i` cannot be read, with its name."""
    name = manifest.name(i)
    return str(error) if name in str(error) else f"{name}: {error}"


class BadSamples:
    """The samples of a split that cannot be read, each counted once. For any thread.

    Each rank counts those that it meets itself, at once, against the whole split; where the ranks
    compare theirs (`take_news`, `merge`), those of all ranks are counted, each once.

    Args:
        manifest: The split.
        total: How many samples are read.
        max_fraction: Largest share of them that may be bad; None: not one.
        flags: What the flags that set this begin with.

    Attributes:
        reasons: Sample -> its name, and why it cannot be read.
    """

    def __init__(
        self,
        manifest: Manifest,
        total: int,
        max_fraction: float | None,
        flags: str = "--data.",
    ) -> None:
        self.manifest, self.total, self.flags = manifest, total, flags
        self.max_fraction = max_fraction
        self.reasons: dict[int, str] = {}
        self._compared: set[int] = set()
        self._is_denied = True
        self._shown = 0
        self._lock = Lock()

    def add(self, i: int, error: DataError) -> None:
        """Count sample `i`, once.

        Raises:
            DataError: It may not be left out, or too many (or all) have been.
            ConfigError: The same, where access was denied to all of them.
        """
        why = reason(self.manifest, i, error)
        is_denied = error.exit_name == ConfigError.exit_name
        if self.max_fraction is None:
            kind = ConfigError if is_denied else DataError
            raise kind(f"{why}; {self.flags}on_error skip leaves such images out") from error
        with self._lock:
            self.reasons[i] = why
            self._is_denied = self._is_denied and is_denied
        self._check(why, error)

    def take_news(self) -> News:
        """Those found since the last call, for the other ranks."""
        with self._lock:
            news = {i: why for i, why in self.reasons.items() if i not in self._compared}
            self._compared.update(news)
            return News(news, self._is_denied)

    def merge(self, news: Iterable[News]) -> None:
        """Count what all ranks have found, the same on each of them.

        Raises:
            DataError: Too many (or all) are bad.
            ConfigError: The same, where access was denied to all of them.
        """
        last = ""
        for each in news:
            self._take_over(each.reasons, each.is_denied)
            last = next(reversed(each.reasons.values()), last)
        if last:
            self._check(last)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: those known so far, and of which samples."""
        reasons = dict(sorted(self.reasons.items()))
        return {"samples": self._fingerprint, "told": reasons}  # these keys are in old checkpoints

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on from a checkpoint on every rank; from that of other samples nothing is taken."""
        if state["samples"] == self._fingerprint:
            self._take_over(state["told"], is_denied=False)

    @functools.cached_property
    def _fingerprint(self) -> str:
        return self.manifest.fingerprint()

    def _take_over(self, reasons: Mapping[int, str], is_denied: bool) -> None:
        """Count samples that every rank knows."""
        with self._lock:
            self.reasons = {**reasons, **self.reasons}
            self._compared.update(reasons)
            self._is_denied = self._is_denied and (is_denied or not reasons)

    def _check(self, last: str, cause: DataError | None = None) -> None:
        assert self.max_fraction is not None
        with self._lock:
            count = len(self.reasons)
            kind = ConfigError if self._is_denied else DataError
        if count == self.total:
            raise kind(f"none of {count} images can be read; the last: {last}") from cause
        if count > self.max_fraction * self.total:
            raise kind(
                f"at least {count} of {self.total} images are bad, more than "
                f"{self.flags}max_bad_fraction {self.max_fraction:g} allows; the last: {last}; "
                "remove them or raise that flag"
            ) from cause

    def take_line(self) -> str | None:
        """A line of how many there are, if there are more than at the last call."""
        with self._lock:
            before, self._shown = self._shown, len(self.reasons)
        if before == self._shown:
            return None
        return (
            f"{self._shown} of {self.total} images could not be read and are skipped "
            f"({self.first_reasons()})"
        )

    def first_reasons(self) -> str:
        """The first few, for a line of a log."""
        named = "; ".join(list(self.reasons.values())[:_NAMED])
        return f"{named}; ..." if len(self.reasons) > _NAMED else named
