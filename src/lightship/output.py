"""The one place where a run lives: config.yaml, checkpoints/, logs/, report/ and DONE."""

import dataclasses
import json
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lightship import config as settings
from lightship import storage
from lightship.checkpoint import CheckpointStore, Commit
from lightship.config import Config
from lightship.exits import ConfigError


class RunOutput:
    """A run's folder at any URL. Used by rank 0 unless a method says otherwise; methods block.

    Args:
        config: The resolved configuration; `run.output` is set.
        say: Prints a line for the user.
    """

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        assert config.run.output is not None
        self.url, self.config, self.say = config.run.output, config, say
        self.attempt = secrets.token_hex(4)

    def at(self, *parts: str) -> str:
        """URL of something inside."""
        return storage.join(self.url, *parts)

    def is_done(self) -> bool:
        """Whether the run has finished for good; says so if it has."""
        if not storage.exists(self.at("DONE")):
            return False
        numbers = json.loads(storage.read_bytes(self.at("DONE")))
        shown = [f"{key} {numbers[key]:.4f}" for key in ("test/acc", "val/acc") if key in numbers]
        report = storage.redact(self.at("report", "report.html"))
        self.say(f"finished already: {', '.join([*shown, f'report: {report}'])}")
        return True

    def checkpoints(self) -> CheckpointStore:
        """The store under this output."""
        return CheckpointStore(
            self.at("checkpoints"),
            self.say,
            attempt=self.attempt,
            config_hash=settings.identity_hash(self.config),
            keep_last=self.config.run.keep_last,
            best_is_lowest=self.config.trainer.monitor.endswith("loss"),
        )

    def open(self) -> tuple[CheckpointStore, Commit | None]:
        """Take the output for this attempt: the store, and the checkpoint to go on from.

        Raises:
            ConfigError: Not writable; run.resume forbids what is there; the configuration changes
                what an earlier start of this run has begun to learn.
        """
        resume = self.config.run.resume
        storage.check_writable(self.url)
        store = self.checkpoints()
        newest = store.newest()
        where = f"--run.output {storage.redact(self.url)}"
        if newest is None and resume == "must":
            raise ConfigError(f"--run.resume must: no good checkpoint under {where}")
        if newest is not None:
            if resume == "never":
                raise ConfigError(
                    f"--run.resume never: {where} already holds a run at step {newest.step}; "
                    "give another output"
                )
            self._refuse_another_run(where)
            store.protect(newest)
        store.open_attempt()
        text = yaml.safe_dump(shown_config(self.config), sort_keys=False)
        storage.write_bytes(self.at("config.yaml"), text.encode())
        return store, newest

    def _refuse_another_run(self, where: str) -> None:
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
                f"{where} holds a run that learns something else: {'; '.join(changed)}. "
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
        storage.write_bytes(self.at("DONE"), json.dumps(numbers, indent=1).encode())


def shown_config(config: Config) -> dict[str, Any]:
    """The resolved settings as plain values, without the credentials a URL may hold."""
    return {
        section: {
            name: storage.redact(value) if isinstance(value, str) else value
            for name, value in fields.items()
        }
        for section, fields in dataclasses.asdict(config).items()
    }
