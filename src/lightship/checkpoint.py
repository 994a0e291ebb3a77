"""Checkpoints that survive: a Lightning CheckpointIO over storage.py with commit records.

A checkpoint is two objects in one folder: `step-N.ckpt`, a plain Lightning file, and, written
after it is durable, `step-N.commit.json` with its size and sha256. What has no matching commit
record does not exist: a reader verifies, and falls back to the one before.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch.utils._pytree import tree_map_only

from lightship import storage
from lightship.exits import ConfigError, LightshipError, PeerLost

_COMMIT = ".commit.json"


class CheckpointDamaged(LightshipError):
    """A committed checkpoint is missing, torn or altered."""


@dataclass(frozen=True)
class Commit:
    """The commit record of one checkpoint.

    Attributes:
        file: Name of the payload in the same folder.
        step: Optimizer steps done.
        epoch: Epochs finished.
        size_bytes: Size of the payload.
        sha256: Of the payload, hex.
        score: The monitored metric if the save followed a validation.
        attempt: Id of the start of the run that wrote it.
        config_hash: Of everything that changes what is learned.
    """

    file: str
    step: int
    epoch: int
    size_bytes: int
    sha256: str
    score: float | None
    attempt: str
    config_hash: str


class CheckpointStore(CheckpointIO):
    """The checkpoints of one run. Used on every rank; only global rank 0 writes.

    `save_checkpoint` copies the state and returns; one background thread serialises, uploads,
    commits and then deletes what retention lets go. At most one save is in flight: the next waits
    for it and raises what went wrong in it.

    Args:
        url: Folder of the checkpoints, anywhere storage.py reaches.
        say: Prints a line for the user.
        attempt: Id of this start of the run. Only the newest attempt may commit: an orphan of an
            earlier one finds another id in the folder and stops.
        config_hash: Recorded in each commit.
        keep_last: Newest checkpoints kept.
        best_is_lowest: Whether the best score is the lowest or the highest.
    """

    def __init__(
        self,
        url: str,
        say: Callable[[str], None],
        attempt: str = "",
        config_hash: str = "",
        keep_last: int = 2,
        best_is_lowest: bool = True,
    ) -> None:
        self.url, self.say, self.attempt, self.config_hash = url, say, attempt, config_hash
        self.keep_last, self.best_is_lowest = keep_last, best_is_lowest
        self._resumed_from: int | None = None
        self._verified: tuple[str, dict[str, Any]] | None = None
        self._in_flight: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")

    # What exists

    def commits(self) -> list[Commit]:
        """All commit records, oldest step first. Blocks on storage."""
        try:
            names = [item.path for item in storage.list_files(self.url)]
        except storage.NotFound:
            return []
        found = []
        for name in names:
            if name.endswith(_COMMIT):
                try:
                    found.append(Commit(**json.loads(storage.read_bytes(self._at(name)))))
                except (json.JSONDecodeError, TypeError, storage.NotFound):
                    self.say(f"checkpoint record {name} is torn or gone; ignored")
        return sorted(found, key=lambda commit: commit.step)

    def newest(self) -> Commit | None:
        """The newest checkpoint that verifies; every one passed over is told of. Blocks."""
        return self._first_good(reversed(self.commits()))

    def best(self) -> Commit | None:
        """The best-scored checkpoint that verifies, else the newest that does. Blocks."""
        sign = 1 if self.best_is_lowest else -1
        commits = self.commits()
        scored = [commit for commit in commits if commit.score is not None]
        scored.sort(key=lambda commit: (sign * (commit.score or 0.0), commit.step))
        unscored = [commit for commit in reversed(commits) if commit.score is None]
        return self._first_good(scored + unscored)

    def url_of(self, commit: Commit) -> str:
        """Where a commit's payload is."""
        return self._at(commit.file)

    def _first_good(self, candidates: Any) -> Commit | None:
        for commit in candidates:
            try:
                self._read(commit)
            except CheckpointDamaged as error:
                self.say(f"{error}; falling back to the one before")
            else:
                return commit
        return None

    # Reading

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """A verified checkpoint, on the CPU. Called by Lightning on every rank. Blocks.

        Raises:
            CheckpointDamaged: It has no commit record, or does not match it.
            ConfigError: It could only be loaded by running code in it.
        """
        self.wait()
        url = str(path)
        if self._verified is None or self._verified[0] != url:
            by_url = {self.url_of(commit): commit for commit in self.commits()}
            if url not in by_url:
                raise CheckpointDamaged(f"checkpoint {storage.redact(url)} was never committed")
            self._read(by_url[url])
        assert self._verified is not None
        checkpoint, self._verified = self._verified[1], None
        return checkpoint

    def protect(self, commit: Commit) -> None:
        """Never let retention delete this one (the one resumed from)."""
        self._resumed_from = commit.step

    def _read(self, commit: Commit) -> None:
        """Load and verify into `_verified`, so that choosing and loading read once."""
        url = self.url_of(commit)
        if self._verified is not None and self._verified[0] == url:
            return
        try:
            payload = storage.read_bytes(url)
        except storage.NotFound:
            raise CheckpointDamaged(f"checkpoint {commit.file} is gone") from None
        if len(payload) != commit.size_bytes:
            raise CheckpointDamaged(
                f"checkpoint {commit.file} has {len(payload)} of {commit.size_bytes} bytes"
            )
        if hashlib.sha256(payload).hexdigest() != commit.sha256:
            raise CheckpointDamaged(f"checkpoint {commit.file} does not match its sha256")
        self._verified = url, load_plain(payload, commit.file)

    # Writing

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Snapshot `checkpoint` and write it in the background. Called by Lightning on rank 0.

        Blocks for the copy only, and for a save that is still in flight.

        Raises:
            LightshipError: The save before this one failed.
        """
        self.wait()
        snapshot = tree_map_only(torch.Tensor, _to_host, checkpoint)
        self._in_flight = self._writer.submit(self._write, snapshot, str(path))

    def wait(self) -> None:
        """Return when no save is in flight. Blocks, within storage's deadlines.

        Raises:
            LightshipError: The save in flight failed.
        """
        if self._in_flight is not None:
            in_flight, self._in_flight = self._in_flight, None
            in_flight.result()

    def raise_failure(self) -> None:
        """Raise what went wrong in the background, if it has already. Does not block."""
        if self._in_flight is not None and self._in_flight.done():
            self.wait()

    def path_of_step(self, step: int) -> str:
        """Where the checkpoint of a step goes."""
        return self._at(f"step-{step:08d}.ckpt")

    def open_attempt(self) -> None:
        """Take the folder over for this attempt. Called by rank 0 at the start. Blocks."""
        storage.write_bytes(self._at("attempt"), self.attempt.encode())

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint, its commit record first. Blocks."""
        url = str(path)
        storage.remove(url.removesuffix(".ckpt") + _COMMIT)
        storage.remove(url)

    def teardown(self) -> None:
        """Finish the save in flight."""
        self.wait()

    def _write(self, snapshot: dict[str, Any], url: str) -> None:
        buffer = io.BytesIO()
        torch.save(snapshot, buffer)
        payload = buffer.getbuffer()
        facts = snapshot.get("lightship", {})
        commit = Commit(
            file=storage.base_name(url),
            step=snapshot["global_step"],
            epoch=snapshot["epoch"],
            size_bytes=len(payload),
            sha256=hashlib.sha256(payload).hexdigest(),
            score=facts.get("score"),
            attempt=self.attempt,
            config_hash=self.config_hash,
        )
        record_url = url.removesuffix(".ckpt") + _COMMIT
        # A record of a damaged payload that this run has passed again must not outlive it.
        storage.remove(record_url)
        storage.write_bytes(url, payload)
        self._check_fence()
        storage.write_bytes(record_url, json.dumps(dataclasses.asdict(commit)).encode())
        self._retain()

    def _check_fence(self) -> None:
        owner = storage.read_bytes(self._at("attempt")).decode()
        if owner != self.attempt:
            raise PeerLost(
                f"another start of this run ({owner}) has taken over {storage.redact(self.url)}; "
                f"this one ({self.attempt}) stops"
            )

    def _retain(self) -> None:
        """Delete what is neither among the newest, nor best, nor the one resumed from."""
        commits = self.commits()
        keep = {commit.step for commit in commits[-self.keep_last :]} | {self._resumed_from}
        scored = [commit for commit in commits if commit.score is not None]
        if scored:
            sign = 1 if self.best_is_lowest else -1
            best = min(scored, key=lambda commit: (sign * (commit.score or 0.0), commit.step))
            keep.add(best.step)
        for commit in commits:
            if commit.step not in keep:
                self.remove_checkpoint(self.url_of(commit))

    def _at(self, name: str) -> str:
        return storage.join(self.url, name)


def load_plain(payload: bytes, name: str) -> dict[str, Any]:
    """A checkpoint's content without running any code in it.

    Args:
        payload: The bytes of a `.ckpt` file.
        name: For the message.

    Raises:
        ConfigError: The file holds more than tensors and plain values.
    """
    try:
        # Said outright, so that no environment variable can turn it off.
        loaded = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(
            f"checkpoint {name} needs code to be unpickled and is refused ({reason})"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f"{name} is not a checkpoint ({reason})") from None
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"checkpoint {name} holds a {type(loaded).__name__}, not a dictionary")
    return dict(loaded)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU that later steps cannot change."""
    return tensor.detach().to("cpu", copy=True)
