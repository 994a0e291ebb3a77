"""The one place where a run lives: config.yaml, checkpoints/, logs/, report/ and DONE."""

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightship import config as settings
from lightship import storage, strict_json
from lightship.checkpoint import CheckpointDamaged, CheckpointStore
from lightship.config import Config
from lightship.exits import ConfigError

_NEEDED = {
    "state_dict", "hyper_parameters", "loops", "optimizer_states", "lr_schedulers", "lightship",
}  # fmt: skip


class Start(NamedTuple):
    """The checkpoint that a start of a run goes on from."""

    url: str
    step: int
    epoch: int


class RunOutput:
    """A run's folder at any URL. Used by rank 0 unless a method says otherwise; methods block.

    Args:
        config: The resolved configuration; `run.output` is set.
        say: Prints a line for the user.
    """

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        assert config.run.output is not None
        self.url, self.config, self.say = config.run.output, config, say

    def at(self, *parts: str) -> str:
        """URL of something inside."""
        return storage.join(self.url, *parts)

    def is_done(self) -> bool:
        """Whether the run has finished for good; says so if it has.

        Raises:
            ConfigError: It has, and run.resume or the configuration ask for something else.
        """
        if not storage.exists(self.at("DONE")):
            return False
        self.refuse_another_run("a finished run")
        numbers = json.loads(storage.read_bytes(self.at("DONE")))
        accuracies = {key: numbers.get(key) for key in ("test/acc", "val/acc")}
        shown = [f"{key} {acc:.4f}" for key, acc in accuracies.items() if acc is not None]
        report = storage.redact(self.at("report", "report.html"))
        self.say(f"finished already: {', '.join([*shown, f'report: {report}'])}")
        return True

    def checkpoints(self) -> CheckpointStore:
        """The store under this output."""
        return CheckpointStore(
            self.at("checkpoints"),
            self.say,
            config_hash=settings.identity_hash(self.config),
            keep_last=self.config.run.keep_last,
            best_is_lowest=self.config.trainer.monitor.endswith("loss"),
        )

    def open(self, ckpt_path: str | None = None) -> tuple[CheckpointStore, Start | None]:
        """Take the output for this start: the store, and the checkpoint to go on from.

        Args:
            ckpt_path: None or `last`: the newest good one; `best`: back to the best (at each start
                that asks for it); a URL: that one, until the run has a checkpoint of its own.

        Raises:
            ConfigError: Not writable; run.resume forbids what is there; the configuration changes
                what an earlier start of this run has begun to learn; no such checkpoint.
        """
        storage.check_writable(self.url)
        store = self.checkpoints()
        where = f"--run.output {storage.redact(self.url)}"
        commits = list(store.commits())
        if commits:
            self.refuse_another_run(f"a run at step {commits[-1].step}")
        commit = store.best() if ckpt_path == "best" else store.newest()
        start = None
        if commit is not None:
            store.protect(commit)
            start = Start(store.url_of(commit), commit.step, commit.epoch)
        elif ckpt_path in ("best", "last"):
            raise ConfigError(f"--ckpt_path {ckpt_path}: no good checkpoint under {where}")
        elif self.config.run.resume == "must":
            raise ConfigError(f"--run.resume must: no good checkpoint under {where}")
        elif ckpt_path is not None:
            start = self._foreign(store, ckpt_path)
        elif commits:
            self.say("no good checkpoint is left: training begins anew")
        max_epochs = self.config.trainer.max_epochs
        if start is not None and 0 <= max_epochs < start.epoch:
            raise ConfigError(
                f"--trainer.max_epochs is {max_epochs}; the checkpoint to go on from has "
                f"{start.epoch} epochs done"
            )
        store.open_attempt()  # the last: a start that is refused leaves the run to its owner
        self._remove_temporaries()
        text = yaml.safe_dump(shown_config(self.config), sort_keys=False)
        storage.write_bytes(self.at("config.yaml"), text.encode())
        return store, start

    def _foreign(self, store: CheckpointStore, url: str) -> Start:
        shown = f"--ckpt_path {storage.redact(url)}"
        try:
            checkpoint = store.load_checkpoint(url)
        except CheckpointDamaged as error:
            raise ConfigError(f"{shown}: {error}") from None
        if missing := _NEEDED - set(checkpoint):
            raise ConfigError(
                f"{shown} is no checkpoint of lightship's to go on from (no {min(missing)} in it); "
                "to start from weights alone give them as --model.weights"
            )
        return Start(url, checkpoint["global_step"], checkpoint["epoch"])

    def _remove_temporaries(self) -> None:
        """Remove what a killed start was just writing (local; elsewhere nothing of it shows)."""
        if not storage.is_remote(self.url):
            for path in storage.local_path(self.url).rglob(".*.lightship-tmp"):
                path.unlink(missing_ok=True)

    def refuse_another_run(self, what: str) -> None:
        """Raise ConfigError if this output already holds a run and the settings forbid that."""
        where = f"--run.output {storage.redact(self.url)} holds {what}"
        if self.config.run.resume == "never":
            raise ConfigError(f"--run.resume never: {where}; give another output")
        kept = yaml.safe_load(storage.read_bytes(self.at("config.yaml")))
        changed = [
            f"{key} was {was!r}, now {now!r}"
            for key, now in settings.identity(self.config).items()
            for section, _, field in [key.partition(".")]
            if (was := kept.get(section, {}).get(field)) != now
            and storage.redact(str(now)) != str(was)
        ]
        if changed:
            raise ConfigError(
                f"{where} that learns something else: {'; '.join(changed)}. "
                "Set these back or give another --run.output"
            )

    def tracking_id(self) -> str | None:
        """The tracking id of an earlier start, if one was kept."""
        url = self.at("logs", "tracking_id")
        return storage.read_bytes(url).decode() if storage.exists(url) else None

    def keep_tracking_id(self, tracking_id: str) -> None:
        """Keep the tracking id for the next start."""
        storage.write_bytes(self.at("logs", "tracking_id"), tracking_id.encode())

    def scratch_path(self) -> Path:
        """A local folder for what must be written locally: the output's logs if it is local."""
        if storage.is_remote(self.url):
            return Path(tempfile.mkdtemp(prefix="lightship-"))
        path = storage.local_path(self.at("logs"))
        path.mkdir(parents=True, exist_ok=True)
        return path

    def mark_done(self, numbers: dict[str, Any]) -> None:
        """End the run for good, with its final numbers."""
        storage.write_bytes(self.at("DONE"), strict_json.dumps(numbers).encode())


def shown_config(config: Config) -> dict[str, Any]:
    """The resolved settings as plain values, without the credentials a URL may hold."""
    return {
        section: {
            name: storage.redact(value) if isinstance(value, str) else value
            for name, value in fields.items()
        }
        for section, fields in dataclasses.asdict(config).items()
    }
