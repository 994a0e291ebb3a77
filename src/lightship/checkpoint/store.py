"""Checkpoints that survive: a Lightning CheckpointIO over storage.py with commit records.

A checkpoint is two objects in one folder: `step-N-ATTEMPT-K.ckpt`, a plain Lightning file under a
name that is never used twice, and, written after it is durable, its record `....commit.json` with
its size and sha256. What has no matching record does not exist: a reader verifies, and falls back
to the one before.
"""

import contextlib
import dataclasses
import hashlib
import logging
import re
import secrets
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO

from lightship import storage, versions
from lightship.checkpoint.loading import read_checkpoint, read_verified
from lightship.checkpoint.record import (
    ATTEMPT,
    DEFAULT_METRIC,
    MAX_RECORD_BYTES,
    PAYLOAD,
    RECORD,
    CheckpointDamaged,
    Commit,
    Metric,
    best_first,
    is_own,
    payload_name,
    record_of,
)
from lightship.checkpoint.serialization import take_snapshot, to_bytes
from lightship.errors import ConfigError, TakenOver, TimeoutExpired

logger = logging.getLogger(__name__)
_ATTEMPT = re.compile(f"({ATTEMPT})(?: ([0-9a-f]{{8}}))?")
"""What the file `attempt` holds: an id, and its check sum (older versions: none)."""


class CheckpointStore(CheckpointIO):
    """The checkpoints of one run. Any rank may read; only global rank 0 writes.

    `save_checkpoint` takes a snapshot and returns; one background thread serializes, uploads,
    commits, and then deletes old checkpoints. At most one save is in flight: the next waits for it
    and raises its error. A crash loses the training since the last durable save: policy.py bounds
    it.

    Args:
        url: Folder of the checkpoints.
        keep_last: How many of the newest checkpoints are kept, besides the best.
        metric: The metric of this start's scores.
        metric_before: Returns the metric of the scores that 0.1.0 recorded without one; None: it
            is `metric`.
    """

    def __init__(
        self,
        url: str,
        keep_last: int = 2,
        metric: Metric = DEFAULT_METRIC,
        metric_before: Callable[[], Metric | None] = lambda: None,
    ) -> None:
        self.url, self.keep_last = url, keep_last
        self.metric, self._metric_before = metric, metric_before
        self.attempt = ""
        self._saves = 0
        self._commits: list[Commit] | None = None
        self._listed: list[str] = []
        self._damaged: list[str] = []
        self._named_late: list[Commit] = []
        self._garbage: list[str] = []
        self._resumed_from = ""
        self._verified: tuple[str, dict[str, Any]] | None = None
        self._in_flight: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")

    # What exists

    def commits(self) -> list[Commit]:
        """The commits not known to be corrupt, oldest first. The first call blocks on storage."""
        if self._commits is None:
            self._commits = self._list()
        return self._commits

    def newest(self) -> Commit | None:
        """The newest checkpoint that verifies; logs those that do not. Blocks."""
        return self._first_good(reversed(self.commits()))

    def best(self) -> Commit | None:
        """The best checkpoint by this start's metric that verifies. Blocks.

        If none has such a score: with a warning, the best by the metric of the newest score; if
        none has a score at all, the newest that verifies.
        """
        scored = [commit for commit in reversed(self.commits()) if commit.metric]
        metric = self.metric
        if scored and all(commit.metric != metric for commit in scored):
            assert scored[0].metric is not None
            metric = scored[0].metric
            logger.warning(
                f"no checkpoint has a {self.metric.monitor} score; the best is chosen by "
                f"{metric.monitor}"
            )
        best = sorted((c for c in scored if c.metric == metric), key=best_first)
        others = [c for c in reversed(self.commits()) if c not in best]
        return self._first_good([*best, *others])

    def url_of(self, commit: Commit) -> str:
        """URL of a commit's payload."""
        return self._at(commit.file)

    def has_changed(self) -> bool:
        """Whether there are other checkpoints than `commits` has listed, which then lists again.

        Blocks. After `open_attempt` an earlier start saves no more.
        """
        if self._names() == self._listed:
            return False
        self._commits = None
        return True

    def _names(self) -> list[str]:
        """Names of all payloads and records; all other files are the user's."""
        try:
            listed = storage.list_files(self.url, skip=lambda folder: True)
        except storage.NotFound:
            return []
        return [item.path for item in listed if is_own(item.path)]

    def _list(self) -> list[Commit]:
        names = self._listed = self._names()
        found, damaged, belonging = [], [], set()
        for name in names:
            if name.endswith(RECORD):
                # An error of the storage is raised: such a record may be whole.
                with contextlib.suppress(storage.NotFound):
                    try:
                        found.append(self._read_record(name))
                        belonging |= {name, found[-1].file}
                    except CheckpointDamaged:
                        damaged.append(name)
        self._damaged = damaged
        # Left by saves that were never committed; deleted after this attempt's first commit.
        self._garbage = [name for name in names if name not in belonging]
        return sorted(self._named(found), key=lambda c: (_number(c.attempt), c.attempt, c.save))

    def _read_record(self, name: str) -> Commit:
        """Raises CheckpointDamaged also for a record of another payload than its own."""
        url = self._at(name)
        try:
            data = storage.read_small(url, MAX_RECORD_BYTES)
        except storage.TooLarge as error:
            raise CheckpointDamaged(str(error)) from None
        commit = Commit.from_bytes(data, storage.redact(url))
        if record_of(commit.file) != name:
            raise CheckpointDamaged(f"{storage.redact(url)} is the record of {commit.file}")
        return commit

    def _named(self, commits: list[Commit]) -> list[Commit]:
        """The commits, with the metric of the scores that 0.1.0 recorded without one."""
        unnamed = [c for c in commits if c.score is not None and c.metric is None]
        if not unnamed:
            return commits
        monitor, mode = self._metric_before() or self.metric
        named = {c.file: dataclasses.replace(c, monitor=monitor, mode=mode) for c in unnamed}
        self._named_late = list(named.values())
        return [named.get(commit.file, commit) for commit in commits]

    def _first_good(self, candidates: Iterable[Commit]) -> Commit | None:
        while self._damaged:
            logger.warning(
                f"checkpoint record {self._damaged.pop()} is corrupt; using the previous checkpoint"
            )
        for commit in list(candidates):
            try:
                self._verify(commit)
            except CheckpointDamaged as error:
                logger.warning(f"{error}; using the previous checkpoint")
                self.commits().remove(commit)
                self._garbage.append(commit.file)
            else:
                return commit
        return None

    # Reading

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """A verified checkpoint, on the CPU. Called by Lightning on every rank. Blocks.

        One of another folder may lack a commit record.

        Raises:
            CheckpointDamaged: It does not match its record, or is of this store and has none.
            ConfigError: It could only be loaded by running code in it.
        """
        self.wait()
        url, verified = str(path), self._verified
        self._verified = None
        if verified is not None and verified[0] == url:
            return verified[1]
        return read_checkpoint(url, must_be_committed=url.startswith(f"{self.url}/"))

    def peek(self, url: str) -> dict[str, Any]:
        """`load_checkpoint`, which the next one of the same URL will not read again. Blocks."""
        checkpoint = self.load_checkpoint(url)
        self._verified = url, checkpoint
        return checkpoint

    def _verify(self, commit: Commit) -> None:
        """Load and verify into `_verified`, so that choosing and loading read once."""
        url = self.url_of(commit)
        if self._verified is None or self._verified[0] != url:
            self._verified = url, read_verified(url, commit)

    # Writing

    def open_attempt(self) -> None:
        """Take the folder over: no earlier attempt can commit from now on.

        Called by rank 0 once it has chosen where to resume. Blocks.
        """
        try:
            before = self._owner()
        except storage.NotFound:
            before = ""
        ids = [each for each in (before, *(c.attempt for c in self.commits())) if each]
        number = 1 + max(map(_number, ids), default=0)
        self.attempt = f"{number:05d}-{secrets.token_hex(3)}"
        if not re.fullmatch(ATTEMPT, self.attempt):
            raise ConfigError(f"{storage.redact(self.url)} has the attempt {number - 1}, the last")
        text = f"{self.attempt} {_check_sum(self.attempt)}"
        storage.write_bytes(self._at("attempt"), text.encode())
        for commit in self._named_late:  # before config.yaml names another metric
            if commit.metric != self.metric:
                storage.write_bytes(record_of(self.url_of(commit)), commit.to_bytes())

    def protect(self, commit: Commit) -> None:
        """Never delete this one (the one resumed from)."""
        self._resumed_from = commit.file

    def path_of_step(self, step: int) -> str:
        """URL for the next save, under a name that is never used twice."""
        self._saves += 1
        return self._at(payload_name(step, self.attempt, self._saves))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Snapshot `checkpoint` and write it in the background. Called by Lightning on rank 0.

        Blocks for the copy, and for a save that is still in flight.

        Raises:
            LightshipError: The save before this one failed.
        """
        self.wait()
        snapshot = take_snapshot(checkpoint)
        self._in_flight = self._writer.submit(self._write, snapshot, str(path), self._saves)

    def wait(self) -> None:
        """Wait for the save in flight. Blocks, within the storage's deadlines.

        Raises:
            LightshipError: The save in flight failed.
        """
        if self._in_flight is not None:
            in_flight, self._in_flight = self._in_flight, None
            in_flight.result()

    @property
    def is_saving(self) -> bool:
        """Whether a save is in flight."""
        return self._in_flight is not None and not self._in_flight.done()

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint, its commit record first. Blocks.

        An earlier start may have written a record after this one has listed its payload alone.
        """
        payload = str(path).removesuffix(RECORD).removesuffix(PAYLOAD) + PAYLOAD
        storage.remove(record_of(payload))
        storage.remove(payload)

    def _write(self, snapshot: dict[str, Any], url: str, save: int) -> None:
        about = snapshot.setdefault("lightship", {})
        about["version"] = versions.VERSIONS["checkpoint"]
        payload, score = to_bytes(snapshot), about.get("score")
        commit = Commit(
            file=storage.base_name(url),
            step=snapshot["global_step"],
            epoch=snapshot["epoch"],
            size_bytes=len(payload),
            sha256=hashlib.sha256(payload).hexdigest(),
            score=score,
            attempt=self.attempt,
            save=save,
            monitor=None if score is None else self.metric.monitor,
            mode=None if score is None else self.metric.mode,
        )
        self.check_fence()  # if the output is gone (unmounted), nothing is written in its place
        storage.write_bytes(url, payload)
        self.check_fence()
        storage.write_bytes(record_of(url), commit.to_bytes())
        self._retain(commit)

    def check_fence(self) -> None:
        """Check that this attempt is the newest. Rank 0, before it writes shared files. Blocks.

        Raises:
            TakenOver: A later start of the run has taken over.
            TimeoutExpired: The output is gone (e.g. unmounted) or read with errors, and may come
                back.
        """
        try:
            owner = self._owner()
        except (storage.NotFound, storage.Denied) as error:
            raise TimeoutExpired(
                f"{storage.redact(self.url)} can no longer be read (unmounted or deleted?): {error}"
            ) from error
        if not owner:
            raise TimeoutExpired(f"{storage.redact(self._at('attempt'))} is damaged")
        if owner != self.attempt:
            raise TakenOver(
                f"another start of this run ({owner}) has taken over {storage.redact(self.url)}; "
                f"this one ({self.attempt}) stops"
            )

    def _owner(self) -> str:
        """Id of the attempt that took the folder over last; empty if its file is damaged."""
        for _ in range(2):  # it may have happened on the way
            text = storage.read_small(self._at("attempt"), MAX_RECORD_BYTES)
            found = _ATTEMPT.fullmatch(text.decode(errors="replace"))
            if found and found[2] in (None, _check_sum(found[1])):
                return found[1]
        return ""

    def _retain(self, committed: Commit) -> None:
        """Delete all but the newest steps, the best by each metric, and the one resumed from."""
        commits = [*self.commits(), committed]
        newest: dict[int, str] = {}  # of each step its newest
        for commit in reversed(commits):
            newest.setdefault(commit.step, commit.file)
        keep = {*list(newest.values())[: self.keep_last], self._resumed_from}
        best: dict[Metric | None, Commit] = {}  # of each metric its best
        for commit in sorted((c for c in commits if c.score is not None), key=best_first):
            best.setdefault(commit.metric, commit)
        keep |= {commit.file for commit in best.values()}
        self._commits = [commit for commit in commits if commit.file in keep]
        self._garbage += [commit.file for commit in commits if commit.file not in keep]
        if self._garbage:
            self.check_fence()  # a later start may resume from one of them
        while self._garbage:
            self.remove_checkpoint(self._at(self._garbage.pop()))

    def _at(self, name: str) -> str:
        return storage.join(self.url, name)


def _number(attempt: str) -> int:
    return int(attempt.partition("-")[0])


def _check_sum(attempt: str) -> str:
    """CRC32 of an id, which a bit that flips on the way would make another start's."""
    return f"{zlib.crc32(attempt.encode()):08x}"
