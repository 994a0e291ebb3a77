"""What a pack is to write, and what of it is there: the plan, its shards, their records."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lightship import storage, versions
from lightship.data.manifest import Manifest
from lightship.data.shards.index import PLAN, WORK, sample_bytes
from lightship.errors import ConfigError

_FORMAT = "pack.json"
_MAX_PLAN_BYTES = 2**20
_COLUMNS = ("ids", "offset", "length", "crc32")


@dataclass(frozen=True)
class Shard:
    """Samples [start, stop) of a split."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def file(self) -> str:
        """Where it lies under DST."""
        return f"{self.split}/shard-{self.number:05d}.tar"

    @property
    def record_file(self) -> str:
        """Where its record lies under DST while packing."""
        return f"{WORK}/{self.split}/shard-{self.number:05d}.json"


@dataclass(frozen=True)
class Plan:
    """All that decides the bytes of the shards; kept as DST/pack.json."""

    source: str
    """Its URL without credentials; for messages only, as one source may be reached by several."""
    fingerprint: dict[str, str]
    """Split -> `Manifest.fingerprint` of the source."""
    shard_mib: float
    short_side_px: int | None
    quality: int | None
    growth: dict[str, float] = field(default_factory=dict)
    """Split -> stored bytes an image's byte in the source, by which shards are cut."""
    format: int = versions.VERSIONS[_FORMAT]

    @property
    def key(self) -> str:
        """Equal for plans that write the same."""
        decisive = {name: value for name, value in asdict(self).items() if name != "source"}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]

    def differences(self, asked: "Plan") -> list[str]:
        """What another command asks for that is not in this plan, in words."""
        changed = []
        if self.fingerprint != asked.fingerprint:
            changed.append(
                f"it was packed from {self.source}, whose files have changed"
                if self.source == asked.source
                else f"it was packed from {self.source}, not from {asked.source}"
            )
        for name in ("shard_mib", "short_side_px", "quality"):
            was, now = getattr(self, name), getattr(asked, name)
            if was != now:
                changed.append(f"--{name} was {was}, now {now}")
        return changed

    def shards(self, manifests: Mapping[str, Manifest]) -> list[Shard]:
        """Every split cut where a shard is full."""
        shards = []
        for split, manifest in manifests.items():
            stored = sample_bytes((manifest.length * self.growth[split]).astype(np.int64))
            full = np.cumsum(stored) - stored  # what lies before each sample
            number = full // max(1, round(self.shard_mib * 2**20))
            starts = np.flatnonzero(np.diff(number, prepend=-1))
            stops = [*starts[1:].tolist(), len(manifest)]
            shards += [
                Shard(split, i, start, stop)
                for i, (start, stop) in enumerate(zip(starts.tolist(), stops, strict=True))
            ]
        return shards

    def save(self, url: str) -> None:
        """Write it under DST. Blocks."""
        storage.write_bytes(storage.join(url, PLAN), json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, url: str) -> "Plan":
        """Read what `save` wrote. Blocks.

        Raises:
            ConfigError: It is damaged, or of a newer version.
        """
        place = storage.redact(storage.join(url, PLAN))
        data = storage.read_small(storage.join(url, PLAN), _MAX_PLAN_BYTES)
        try:
            content = json.loads(data)
            versions.check(_FORMAT, content.get("format"), place)
            plan = cls(**content)
            _check_types(plan)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{place} is damaged ({error}); remove DST, or give another"
            ) from error
        return plan


def _check_types(plan: Plan) -> None:
    """Raise TypeError for a field of another type than `Plan.save` writes."""
    numbers = {"shard_mib": plan.shard_mib, **{f"growth {k}": v for k, v in plan.growth.items()}}
    numbers |= {
        name: value
        for name in ("short_side_px", "quality")
        if (value := getattr(plan, name)) is not None
    }
    for name, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise TypeError(f"{name} is {value!r:.80}")
    if plan.growth.keys() != plan.fingerprint.keys():
        raise TypeError(f"growth of {', '.join(plan.growth)}, not {', '.join(plan.fingerprint)}")


@dataclass
class ShardRecord:
    """What a finished shard holds. K samples in its order."""

    size: int
    """Bytes of the tar; 0: no image could be read, so there is none."""
    ids: np.ndarray
    """[K] int64 positions in the source's split."""
    offset: np.ndarray
    """[K] int64, as are `length` and `crc32`: columns of the shards' manifest."""
    length: np.ndarray
    crc32: np.ndarray
    bad: dict[int, str]
    """Position -> why it is left out."""

    def save(self, url: str, shard: Shard, key: str) -> None:
        """Commit the shard, which is written. Blocks."""
        content: dict[str, Any] = {"key": key, "samples": [shard.start, shard.stop]}
        content |= {"size": self.size, "bad": self.bad}
        content |= {name: getattr(self, name).tolist() for name in _COLUMNS}
        storage.write_bytes(storage.join(url, shard.record_file), json.dumps(content).encode())

    @classmethod
    def parse(cls, data: bytes, shard: Shard, key: str) -> "ShardRecord | None":
        """The record if it is whole and of this shard and plan; without one a shard is redone."""
        try:
            content = json.loads(data)
            if content["key"] != key or content["samples"] != [shard.start, shard.stop]:
                return None
            columns = {name: np.array(content[name], dtype=np.int64) for name in _COLUMNS}
            bad = {int(i): str(reason) for i, reason in content["bad"].items()}
            ids = columns["ids"]
            is_whole = sorted([*ids.tolist(), *bad]) == list(range(shard.start, shard.stop))
            if not is_whole or any(values.shape != ids.shape for values in columns.values()):
                return None
            return cls(size=content["size"], bad=bad, **columns)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return None
