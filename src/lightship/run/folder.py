"""A run's folder: config.yaml, checkpoints/, logs/, report/ and DONE under run.output."""

import contextlib
import dataclasses
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightship import config as settings
from lightship import storage, strict_json
from lightship.checkpoint.loading import RESUME_KEYS, load_ckpt_path
from lightship.checkpoint.record import Commit, Metric
from lightship.checkpoint.store import CheckpointStore
from lightship.config import Config, TrainerConfig
from lightship.errors import ConfigError, PeerLost, TimeoutExpired
from lightship.run import config_file
from lightship.run.completion import Finished, read_results, shown_bounds
from lightship.run.quarantine import set_aside

logger = logging.getLogger(__name__)
_FOLDERS = (
    "checkpoints", "data", "export", "features", "features/sample", "features/train",
    "features/val", "logs", "logs/wandb", "report",
)  # fmt: skip
"""All that are written to or deleted from."""
_FILES = (
    "DONE", "logs/metrics.csv", "logs/starts.json", "logs/tracking_id", "report/report.html",
    "report/report.json",
)  # fmt: skip
"""What a run has only after its config.yaml."""
_MAX_ID_BYTES = 1024
_SEEN_WITHIN_S = 90.0  # NFS and SMB keep for up to 60 s that a file is missing


class Start(NamedTuple):
    """Where a start begins.

    Attributes:
        url: The checkpoint that it resumes from; None: it starts from scratch.
        step: Optimizer steps done.
        epoch: Epochs done.
    """

    url: str | None = None
    step: int = 0
    epoch: int = 0


class RunFolder:
    """A run's folder at any URL. Methods are called by rank 0, and block.

    Args:
        config: The resolved configuration; `run.output` is set.

    Raises:
        ConfigError: One of its folders is a link.

    Attributes:
        url: `run.output`.
        checkpoints: The store under it.
    """

    def __init__(self, config: Config) -> None:
        assert config.run.output is not None
        self.url, self.config = config.run.output, config
        for folder in _FOLDERS:
            storage.refuse_link(self.at(folder))
        self.checkpoints = CheckpointStore(
            self.at("checkpoints"),
            keep_last=config.run.keep_last,
            metric=Metric.of(config.trainer.monitor),
            metric_before=self._metric_before,
        )

    @property
    def name(self) -> str:
        """The last part of its URL."""
        return storage.base_name(self.url)

    def at(self, *parts: str) -> str:
        """URL of a file or folder in it."""
        return storage.join(self.url, *parts)

    def completed(self) -> str | None:
        """Why there is nothing to train, if the run is complete; else None. Reads only.

        Raises:
            ConfigError: run.resume or the settings ask for another run.
        """
        if not storage.exists(self.at("DONE")):
            return None
        self.refuse_another_run("a finished run")
        results = read_results(self.at("DONE"))
        if results is None:
            return None  # `open` warns
        commits, reasons = self.checkpoints.commits(), []
        if commits:
            before = TrainerConfig(**config_file.read(self.url)["trainer"])
            finished = self._finished(commits, before)
            if finished.trains_on(self.config.trainer):
                return None
            reasons = finished.why_complete(self.config.trainer)
        report = f"report: {storage.redact(self.at('report', 'report.html'))}"
        shown = [f"{key} {value:.4f}" for key, value in results.items()]
        return "; ".join([f"run already complete: {', '.join([*shown, report])}", *reasons])

    def _finished(self, commits: Sequence[Commit], settings: TrainerConfig) -> Finished:
        """The finished run that has these records, oldest first."""
        last, is_scored = commits[-1], any(commit.metric for commit in commits)
        best = self.checkpoints.best() if last.score is None and is_scored else None
        url = storage.redact(self.checkpoints.url_of(best)) if best else None
        return Finished(last.step, last.epoch, settings, last.score is not None, url)

    def _metric_before(self) -> Metric | None:
        """Of the checkpoints of a version that did not record it."""
        try:
            return Metric.of(config_file.read(self.url)["trainer"]["monitor"])
        except storage.NotFound:
            return None

    def settings_of_same_weights(self) -> dict[str, Any] | None:
        """The data section of the run's earlier start, if it had this net and these weights."""
        before = self._settings_with_checkpoint()
        return before["data"] if before is not None and self._has_weights_of(before) else None

    def _settings_with_checkpoint(self) -> dict[str, dict[str, Any]] | None:
        """The settings of the run's earlier starts; None if it has no checkpoint.

        Such a start may have chosen by images that were incomplete, or by a file of weights that
        is another one now.
        """
        try:
            before = config_file.read(self.url)
        except storage.NotFound:
            return None
        # Not `self.checkpoints`, which would keep what it finds while the images are counted.
        return before if CheckpointStore(self.checkpoints.url).commits() else None

    def earlier_choices(self, names: Collection[str]) -> dict[str, Any]:
        """`section.field` -> what an earlier start chose where the settings leave it open.

        By the weights (`config.PREPROCESSING`), or what `choices.Choices` names. Nothing if the run
        has no checkpoint.

        Args:
            names: Of the latter settings, chosen or not.
        """
        before = self._settings_with_checkpoint()
        if before is None:
            return {}
        found = {}
        for name in names:
            section, _, field = name.partition(".")
            found[name] = before[section][field]
        if self.config.model.weights is not None and self._has_weights_of(before):
            data = self.config.data
            open_fields = [key for key in settings.PREPROCESSING if getattr(data, key) is None]
            found |= {f"data.{key}": before["data"][key] for key in open_fields}
        return found

    def _has_weights_of(self, before: Mapping[str, Mapping[str, Any]]) -> bool:
        now = dataclasses.asdict(self.config)
        same = ("model", "net"), ("model", "weights"), ("data", "normalize")
        return all(_is_same("", before[part][key], now[part][key]) for part, key in same)

    def open(self, ckpt_path: str | None = None) -> Start:
        """Take the run over for this start, and choose the checkpoint to resume from.

        Args:
            ckpt_path: None or `last`: the newest valid one; `best`: the best one, at every start
                with this flag; a URL: that one, until the run has a checkpoint itself.

        Raises:
            ConfigError: The folder is not writable; run.resume forbids to use it; the settings are
                incompatible with those of an earlier start; there is no such checkpoint.
        """
        storage.check_writable(self.url)
        start = self._choose(ckpt_path)
        self.checkpoints.open_attempt()  # a start that was refused leaves the run to its owner
        if self.checkpoints.has_changed():  # by an earlier start that still ran
            start = self._choose(ckpt_path)
        self._remove_temporaries()
        self._remove_done(start)
        config_file.write(self.url, self.config)
        return start

    def _choose(self, ckpt_path: str | None) -> Start:
        """Where this start begins. Raises as `open`."""
        store = self.checkpoints
        where = f"--run.output {storage.redact(self.url)}"
        commits = list(store.commits())
        if commits:
            self.refuse_another_run(f"a run at step {commits[-1].step}")
        else:
            self._refuse_foreign_files()
        commit = store.best() if ckpt_path == "best" else store.newest()
        start = Start()
        if commit is not None:
            store.protect(commit)
            start = Start(store.url_of(commit), commit.step, commit.epoch)
        elif ckpt_path in ("best", "last"):
            raise ConfigError(
                f"--ckpt_path {ckpt_path}: no valid checkpoint under {where}; correct "
                "--run.output or leave --ckpt_path out"
            )
        elif self.config.run.resume == "must":
            raise ConfigError(
                f"--run.resume must: no valid checkpoint under {where}; correct --run.output or "
                "set --run.resume auto"
            )
        elif ckpt_path is not None:
            foreign = load_ckpt_path(ckpt_path, RESUME_KEYS, store.url)
            start = Start(ckpt_path, foreign["global_step"], foreign["epoch"])
        elif commits:
            logger.warning("no valid checkpoint found; starting from scratch")
        self._refuse_fewer(start)
        return start

    def sees(self, attempt: str) -> bool:
        """Whether this process sees a local output as rank 0 has left it in `open`. Any rank.

        Blocks for 90 s if it does not.

        Args:
            attempt: `checkpoints.attempt` of rank 0.
        """
        store = CheckpointStore(self.checkpoints.url)
        store.attempt = attempt
        path = storage.local_path(store.url)
        until = time.monotonic() + _SEEN_WITHIN_S
        while True:
            try:
                store.check_fence()
                return True
            except (PeerLost, TimeoutExpired):
                if time.monotonic() > until:
                    return False
            for folder in (path.parents[1], path.parent, path):
                with contextlib.suppress(OSError):
                    os.listdir(folder)  # NFS then asks its server again
            time.sleep(0.5)

    def _refuse_foreign_files(self) -> None:
        """Raise ConfigError if a file is not a run's that this one would overwrite."""
        try:
            config_file.read(self.url)  # raises for what is no run's
        except storage.NotFound:
            where = f"--run.output {storage.redact(self.url)}"
            for name in _FILES if self._holds_files() else ():
                if storage.exists(self.at(name)):
                    raise ConfigError(
                        f"{where} holds {name}, and no {config_file.FILE} of a run: give another "
                        "--run.output"
                    ) from None

    def _holds_files(self) -> bool:
        try:
            return bool(storage.list_files(self.url, max_files=1))
        except storage.NotFound:
            return False

    def _remove_done(self, start: Start) -> None:
        """Remove DONE, if there is one; a damaged one is kept under another name."""
        if not storage.exists(self.at("DONE")):
            return
        if read_results(self.at("DONE")) is None:
            set_aside(self.at("DONE"), "is damaged")
        elif start.url is not None:
            bounds = shown_bounds(self.config.trainer)
            logger.info(
                f"run was complete at step {start.step}, epoch {start.epoch}; training on: {bounds}"
            )
        storage.remove(self.at("DONE"))

    def _refuse_fewer(self, start: Start) -> None:
        trainer = self.config.trainer
        for name, bound, done in (
            ("max_epochs", trainer.max_epochs, start.epoch),
            ("max_steps", trainer.max_steps, start.step),
        ):
            if 0 <= bound < done:
                raise ConfigError(
                    f"--trainer.{name} is {bound}; the checkpoint is at {done} "
                    f"{name.removeprefix('max_')}: set {done} or more"
                )

    def _remove_temporaries(self) -> None:
        """Remove the temporary files of a killed start (object stores have none)."""
        for folder in ("", *_FOLDERS):
            storage.remove_temporaries(self.at(folder))

    def refuse_another_run(self, what: str) -> None:
        """Raise ConfigError if the settings are incompatible with the run that is here."""
        where = f"--run.output {storage.redact(self.url)} holds {what}"
        if self.config.run.resume == "never":
            raise ConfigError(f"--run.resume never: {where}; give another output")
        try:
            before = config_file.read(self.url)
        except storage.NotFound:
            raise ConfigError(
                f"{where} without {config_file.FILE}, the settings it was trained with: "
                "restore the file or give another --run.output"
            ) from None
        changed = [
            f"{key} was {was!r}, now {now!r}"
            for key, now in settings.identity(self.config).items()
            for section, _, field in [key.partition(".")]
            if not _is_same(key, was := before[section][field], now)
        ]
        if changed:
            raise ConfigError(
                f"{where} with incompatible settings: {'; '.join(changed)}. "
                "Set these back or give another --run.output"
            )

    def tracking_id(self, is_id: Callable[[str], bool]) -> str | None:
        """The tracking id of an earlier start; None if there is none or it is damaged.

        Args:
            is_id: Whether a text can be one.
        """
        url = self.at("logs", "tracking_id")
        if not storage.exists(url):
            return None
        if storage.is_link(url):  # to a secret, whose text would be kept here and sent
            set_aside(url, "is a link")
            return None
        text = storage.read_small(url, _MAX_ID_BYTES).decode(errors="replace").strip()
        if "\ufffd" not in text and is_id(text):  # not UTF-8
            return text
        set_aside(url, "is damaged")
        return None

    def keep_tracking_id(self, tracking_id: str) -> None:
        """Store the tracking id for the next start."""
        storage.write_bytes(self.at("logs", "tracking_id"), tracking_id.encode())

    def scratch_path(self) -> Path:
        """A local folder for files that must be local: logs/ if the output is local."""
        if storage.is_remote(self.url):
            return Path(tempfile.mkdtemp(prefix="lightship-"))
        path = storage.local_path(self.at("logs"))
        path.mkdir(parents=True, exist_ok=True)
        return path

    def mark_done(self, numbers: dict[str, Any]) -> None:
        """Mark the run as complete, with its final metrics."""
        storage.write_bytes(self.at("DONE"), strict_json.dumps(numbers).encode())


def _is_same(key: str, was: Any, now: Any) -> bool:
    """Whether a setting has the value of the run's earlier starts, credentials aside."""
    if key == "data.root":
        return settings.is_same_root(str(was), now) or _as_stored_before(now) == was
    return bool(was == now) or (isinstance(now, str) and _as_stored_before(now) == was)


def _as_stored_before(url: str) -> str:
    """A URL as 0.1.0 stored it: any user and the whole query replaced."""
    return re.sub(r"(\w://[^\s?]*)\?.*", r"\1?***", re.sub(r"(?<=://)[^/\s@]+@", "***@", url))
