"""The commit record of a checkpoint: a small JSON file beside it, written last."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightship import versions
from lightship.errors import LightshipError

PAYLOAD, RECORD = ".ckpt", ".commit.json"
ATTEMPT = r"[0-9]{5,9}-[0-9a-f]{6}"
"""An attempt's id: its number, and a random part."""
MAX_RECORD_BYTES = 2**16
"""Of a record, and of the file `attempt`."""
_OWN = re.compile(rf"step-[0-9]{{8,15}}-{ATTEMPT}-[0-9]{{1,15}}\.(?:ckpt|commit\.json)")
_FORMAT = "checkpoint record"
_MAX_COUNT, _MAX_SCORE = 10**15, 1e300


class CheckpointDamaged(LightshipError):
    """A checkpoint is missing, torn or altered, or was never committed."""


class Metric(NamedTuple):
    """The metric of a score; scores of different metrics are not compared.

    Attributes:
        monitor: Its name.
        mode: Whether the best score is the `min` or the `max`.
    """

    monitor: str
    mode: str

    @classmethod
    def of(cls, monitor: str) -> "Metric":
        """The metric of that name."""
        return cls(monitor, "min" if monitor.endswith("loss") else "max")


DEFAULT_METRIC = Metric.of("val/loss")


@dataclass(frozen=True)
class Commit:
    """The commit record of one checkpoint.

    Attributes:
        file: Name of the payload in the same folder.
        step: Optimizer steps done.
        size_bytes: Size of the payload.
        sha256: Of the payload, hex.
        attempt: Id of the start that wrote it; ids sort in the order of the starts.
        epoch: Epochs done.
        score: The monitored metric if the save closed a validated epoch.
        save: Number of the save within its attempt, from 1.
        monitor: Name of the metric of `score`; None: 0.1.0 did not record it.
        mode: `min` or `max`, as of Metric.
    """

    file: str
    step: int
    size_bytes: int
    sha256: str
    attempt: str
    epoch: int = 0
    score: float | None = None
    save: int = 0
    monitor: str | None = None
    mode: str | None = None

    @property
    def metric(self) -> Metric | None:
        """The metric of the score; None without a score, or if the metric is unknown."""
        known = self.score is not None and self.monitor is not None and self.mode is not None
        return Metric(str(self.monitor), str(self.mode)) if known else None

    def to_bytes(self) -> bytes:
        """JSON with its version and its own checksum."""
        fields = {**dataclasses.asdict(self), "version": versions.VERSIONS[_FORMAT]}
        return json.dumps({**fields, "check": _check(fields)}, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "checkpoint record") -> "Commit":
        """Parse what `to_bytes` of this or an older version wrote.

        Raises:
            CheckpointDamaged: The data is corrupt.
            NewerVersion: A newer version wrote it.
        """
        try:
            fields = json.loads(data)
            is_whole = isinstance(fields, dict) and fields.pop("check", None) == _check(fields)
        except (ValueError, RecursionError):
            is_whole = False
        if not is_whole:
            raise CheckpointDamaged(f"{where} is corrupt")
        versions.check(_FORMAT, fields.get("version"), where)
        known = {item.name for item in dataclasses.fields(cls)}
        try:
            commit = cls(**{name: value for name, value in fields.items() if name in known})
        except TypeError:
            raise CheckpointDamaged(f"{where} is corrupt: a field is missing") from None
        if wrong := commit._wrong():
            raise CheckpointDamaged(f"{where} is corrupt: {wrong} is {fields.get(wrong)!r:.80}")
        return commit

    def _wrong(self) -> str | None:
        """The first field that is not as a store writes it, if there is one."""
        for name in ("step", "size_bytes", "epoch", "save"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < _MAX_COUNT:
                return name
        for name, pattern in (("attempt", ATTEMPT), ("sha256", "[0-9a-f]{64}")):
            value = getattr(self, name)
            if not isinstance(value, str) or not re.fullmatch(pattern, value):
                return name
        if self.file != payload_name(self.step, self.attempt, self.save):
            return "file"
        score, monitor = self.score, self.monitor
        if score is not None and not (type(score) in (int, float) and abs(score) < _MAX_SCORE):
            return "score"
        if monitor is not None and not (isinstance(monitor, str) and monitor.isprintable()):
            return "monitor"
        return None if self.mode in (None, "min", "max") else "mode"


def payload_name(step: int, attempt: str, save: int) -> str:
    """The name of a checkpoint's payload, which is never used twice."""
    return f"step-{step:08d}-{attempt}-{save}{PAYLOAD}"


def is_own(name: str) -> bool:
    """Whether a file's name is exactly one that a store writes: others are never deleted."""
    return _OWN.fullmatch(name) is not None


def record_of(payload: str) -> str:
    """The name or URL of a payload's commit record."""
    return payload.removesuffix(PAYLOAD) + RECORD


def best_first(commit: Commit) -> tuple[float, int]:
    """Sort key of scored commits of one metric: the best comes first."""
    assert commit.score is not None
    return commit.score if commit.mode == "min" else -commit.score, commit.step


def _check(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
