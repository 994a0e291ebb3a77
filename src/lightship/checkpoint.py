"""Checkpoints that survive: a Lightning CheckpointIO over storage.py with commit records.

A checkpoint is two objects in one folder: `step-N-ATTEMPT-K.ckpt`, a plain Lightning file under a
name that is never used twice, and, written after it is durable, its record `....commit.json` with
its size and sha256. What has no matching record does not exist: a reader verifies, and falls back
to the one before.
"""

import dataclasses
import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO

from lightship import storage
from lightship.exits import LightshipError, PeerLost
from lightship.payload import from_bytes, take_snapshot, to_bytes

_PAYLOAD, _RECORD = ".ckpt", ".commit.json"


class CheckpointDamaged(LightshipError):
    """A checkpoint is missing, torn or altered, or was never committed."""


@dataclass(frozen=True)
class Commit:
    """The commit record of one checkpoint.

    Attributes:
        file: Name of the payload in the same folder.
        step: Optimizer steps done.
        epoch: Epochs finished.
        size_bytes: Size of the payload.
        sha256: Of the payload, hex.
        score: The monitored metric if the save closed a validated epoch.
        attempt: Id of the start of the run that wrote it; ids sort in the order of the starts.
        save: Which save of its attempt it is, from 1.
        config_hash: Of everything that changes what is learned.
    """

    file: str
    step: int
    epoch: int
    size_bytes: int
    sha256: str
    score: float | None
    attempt: str
    save: int
    config_hash: str

    def to_bytes(self) -> bytes:
        """JSON with a check sum of itself."""
        fields = dataclasses.asdict(self)
        return json.dumps({**fields, "check": _check(fields)}, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Commit":
        """What `to_bytes` wrote. Raises ValueError for anything else."""
        fields = json.loads(data)
        if not isinstance(fields, dict) or fields.pop("check", None) != _check(fields):
            raise ValueError("not a commit record")
        return cls(**fields)


class CheckpointStore(CheckpointIO):
    """The checkpoints of one run. Any rank may read; only global rank 0 writes.

    `save_checkpoint` copies the state and returns; one background thread serialises, uploads,
    commits and then deletes what retention lets go. At most one save is in flight: the next waits
    for it and raises what went wrong in it. Until a save is durable, a kill loses what came after
    the one before it: callbacks/loss_bound.py keeps that within what the user has set.

    Args:
        url: Folder of the checkpoints, anywhere storage.py reaches; empty: a run has none, and only
            `load_checkpoint` is of use.
        say: Prints a line for the user.
        config_hash: Recorded in each commit.
        keep_last: Newest checkpoints kept, beside the best.
        best_is_lowest: Whether the best score is the lowest or the highest.
    """

    def __init__(
        self,
        url: str,
        say: Callable[[str], None],
        config_hash: str = "",
        keep_last: int = 2,
        best_is_lowest: bool = True,
    ) -> None:
        self.url, self.say, self.config_hash = url, say, config_hash
        self.keep_last, self.best_is_lowest = keep_last, best_is_lowest
        self.attempt = ""
        self._saves = 0
        self._commits: list[Commit] | None = None
        self._torn: list[str] = []
        self._garbage: list[str] = []
        self._resumed_from = ""
        self._verified: tuple[str, dict[str, Any]] | None = None
        self._in_flight: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")

    # What exists

    def commits(self) -> list[Commit]:
        """The commits not known to be damaged, oldest first. The first call blocks on storage."""
        if self._commits is None:
            self._commits = self._list()
        return self._commits

    def newest(self) -> Commit | None:
        """The newest checkpoint that verifies; every one passed over is told of. Blocks."""
        return self._first_good(reversed(self.commits()))

    def best(self) -> Commit | None:
        """The best-scored checkpoint that verifies, else the newest that does. Blocks."""
        commits = self.commits()
        scored = sorted((c for c in commits if c.score is not None), key=self._rank)
        return self._first_good([*scored, *reversed([c for c in commits if c.score is None])])

    def url_of(self, commit: Commit) -> str:
        """Where a commit's payload is."""
        return self._at(commit.file)

    def _list(self) -> list[Commit]:
        try:
            names = [item.path for item in storage.list_files(self.url)]
        except storage.NotFound:
            names = []
        found, torn, belonging = [], [], set()
        for name in names:
            if name.endswith(_RECORD):
                try:
                    found.append(Commit.from_bytes(storage.read_bytes(self._at(name))))
                    belonging |= {name, found[-1].file}
                except (ValueError, TypeError, storage.NotFound):
                    torn.append(name)
        self._torn = torn
        # Of saves that never came to be: they go when this attempt has committed one of its own.
        self._garbage = [n for n in names if n.startswith("step-") and n not in belonging]
        return sorted(found, key=lambda commit: (commit.attempt, commit.save))

    def _rank(self, commit: Commit) -> tuple[float, int]:
        assert commit.score is not None
        return commit.score if self.best_is_lowest else -commit.score, commit.step

    def _first_good(self, candidates: Iterable[Commit]) -> Commit | None:
        while self._torn:
            self.say(
                f"checkpoint record {self._torn.pop()} is torn; falling back to the one before"
            )
        for commit in list(candidates):
            try:
                self._verify(self.url_of(commit), commit)
            except CheckpointDamaged as error:
                self.say(f"{error}; falling back to the one before")
                self.commits().remove(commit)
                self._garbage += [_record_of(commit.file), commit.file]
            else:
                return commit
        return None

    # Reading

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """A verified checkpoint, on the CPU. Called by Lightning on every rank. Blocks.

        One of another folder may lack a record; it is then taken as it is.

        Raises:
            CheckpointDamaged: It does not match its record, or is one of ours that has none.
            ConfigError: It could only be loaded by running code in it.
        """
        self.wait()
        url = str(path)
        if self._verified is None or self._verified[0] != url:
            try:
                record = Commit.from_bytes(storage.read_bytes(_record_of(url)))
            except (storage.NotFound, storage.Denied):  # how S3 says it to who may not list
                if self.url and url.startswith(f"{self.url}/"):
                    raise CheckpointDamaged(f"{storage.redact(url)} was never committed") from None
                record = None
            except (ValueError, TypeError):
                raise CheckpointDamaged(f"the record of {storage.redact(url)} is torn") from None
            self._verify(url, record)
        assert self._verified is not None
        checkpoint, self._verified = self._verified[1], None
        return checkpoint

    def _verify(self, url: str, commit: Commit | None) -> None:
        """Load and verify into `_verified`, so that choosing and loading read once."""
        if self._verified is not None and self._verified[0] == url:
            return
        name = storage.base_name(url)
        try:
            payload = storage.read_bytes(url)
            if commit and hashlib.sha256(payload).hexdigest() != commit.sha256:
                payload = storage.read_bytes(url)  # it may have happened on the way
        except storage.NotFound:
            raise CheckpointDamaged(f"checkpoint {name} is gone") from None
        except storage.StorageTimeout as error:
            if type(error.__cause__).__name__ != "FlexibleChecksumError":
                raise
            # S3's client compares with a sum that the server keeps, and that will never agree.
            raise CheckpointDamaged(f"checkpoint {name} does not match the storage's sum") from None
        if commit and len(payload) != commit.size_bytes:
            raise CheckpointDamaged(
                f"checkpoint {name} has {len(payload)} of {commit.size_bytes} bytes"
            )
        if commit and hashlib.sha256(payload).hexdigest() != commit.sha256:
            raise CheckpointDamaged(f"checkpoint {name} does not match its sha256")
        self._verified = url, from_bytes(payload, name)

    # Writing

    def open_attempt(self) -> None:
        """Take the folder over: no earlier attempt can commit from here on.

        Called by rank 0 when it has chosen what to go on from. Blocks.
        """
        try:
            before = storage.read_bytes(self._at("attempt")).decode(errors="replace")
        except storage.NotFound:
            before = ""
        numbers = [re.match(r"\d+", i) for i in (before, *(c.attempt for c in self.commits()))]
        number = 1 + max((int(found[0]) for found in numbers if found), default=0)
        self.attempt = f"{number:05d}-{secrets.token_hex(3)}"
        storage.write_bytes(self._at("attempt"), self.attempt.encode())

    def protect(self, commit: Commit) -> None:
        """Never let retention delete this one (the one resumed from)."""
        self._resumed_from = commit.file

    def path_of_step(self, step: int) -> str:
        """Where the next save goes: a name of its own."""
        self._saves += 1
        return self._at(f"step-{step:08d}-{self.attempt}-{self._saves}{_PAYLOAD}")

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Snapshot `checkpoint` and write it in the background. Called by Lightning on rank 0.

        Blocks for the copy only, and for a save that is still in flight.

        Raises:
            LightshipError: The save before this one failed.
        """
        self.wait()
        snapshot = take_snapshot(checkpoint)
        self._in_flight = self._writer.submit(self._write, snapshot, str(path), self._saves)

    def wait(self) -> None:
        """Return when no save is in flight. Blocks, within storage's deadlines.

        Raises:
            LightshipError: The save in flight failed.
        """
        if self._in_flight is not None:
            in_flight, self._in_flight = self._in_flight, None
            in_flight.result()

    @property
    def is_saving(self) -> bool:
        """Whether a save is neither durable nor failed."""
        return self._in_flight is not None and not self._in_flight.done()

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint, its commit record first. Blocks."""
        storage.remove(_record_of(str(path)))
        storage.remove(str(path))

    def teardown(self) -> None:
        """Finish the save in flight."""
        self.wait()

    def _write(self, snapshot: dict[str, Any], url: str, save: int) -> None:
        payload = to_bytes(snapshot)
        commit = Commit(
            file=storage.base_name(url),
            step=snapshot["global_step"],
            epoch=snapshot["epoch"],
            size_bytes=len(payload),
            sha256=hashlib.sha256(payload).hexdigest(),
            score=snapshot.get("lightship", {}).get("score"),
            attempt=self.attempt,
            save=save,
            config_hash=self.config_hash,
        )
        storage.write_bytes(url, payload)
        self.check_fence()
        storage.write_bytes(_record_of(url), commit.to_bytes())
        self._retain(commit)

    def check_fence(self) -> None:
        """Return if this attempt is the newest. Rank 0, before it writes what is shared. Blocks.

        Raises:
            PeerLost: A later start of the run has taken over.
        """
        owner = storage.read_bytes(self._at("attempt")).decode(errors="replace")
        if owner != self.attempt:
            raise PeerLost(
                f"another start of this run ({owner}) has taken over {storage.redact(self.url)}; "
                f"this one ({self.attempt}) stops"
            )

    def _retain(self, committed: Commit) -> None:
        """Delete what is neither of the newest steps, nor best, nor the one resumed from."""
        commits = [*self.commits(), committed]
        newest: dict[int, str] = {}  # of each step its newest
        for commit in reversed(commits):
            newest.setdefault(commit.step, commit.file)
        keep = {*list(newest.values())[: self.keep_last], self._resumed_from}
        scored = [commit for commit in commits if commit.score is not None]
        if scored:
            keep.add(min(scored, key=self._rank).file)
        self._commits = [commit for commit in commits if commit.file in keep]
        for commit in commits:
            if commit.file not in keep:
                self.remove_checkpoint(self.url_of(commit))
        while self._garbage:
            storage.remove(self._at(self._garbage.pop()))

    def _at(self, name: str) -> str:
        return storage.join(self.url, name)


def _record_of(payload: str) -> str:
    """The name or URL of the commit record of a payload's."""
    return payload.removesuffix(_PAYLOAD) + _RECORD


def _check(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
