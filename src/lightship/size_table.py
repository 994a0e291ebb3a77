"""Settings that depend on the number of training images: the table in a recipe.

In a config file, under `by_train_images`, rows like {up_to: 500, trainer: {max_epochs: 30}}: the
first row whose `up_to` is at least the number of training images gives its settings, and the last
row, without `up_to`, gives those of every larger set.
"""

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightship.config import Config
from lightship.config import check as check_config
from lightship.errors import ConfigError, LightshipError, UsageError
from lightship.redaction import redact

KEY = "by_train_images"
_UP_TO = "up_to"
_KNOWN_BEFORE = (
    "data.root", "data.root_md5", "data.val_fraction", "trainer.accelerator", "trainer.devices",
    "trainer.timeout_s", "trainer.monitor",
)  # fmt: skip
"""Used to start the processes, open the run or count its training images; as is all of `run`."""


@dataclass(frozen=True)
class Row:
    """Settings of data sets up to a size.

    Attributes:
        up_to: Largest number of training images; None: any.
        settings: `section.field` -> value.
    """

    up_to: int | None
    settings: Mapping[str, Any]


Table = tuple[Row, ...]


def read(content: Any, where: str) -> Table:
    """The rows of a config file; their settings are checked as those of a file are, later.

    Raises:
        UsageError: It is no such table.
    """
    rows = content if isinstance(content, list) else []
    sizes = [row.get(_UP_TO) for row in rows if isinstance(row, dict)]
    is_right = len(sizes) == len(rows) > 0 and sizes[-1] is None
    numbers = [size for size in sizes[:-1] if type(size) is int and size > 0]
    if not is_right or len(numbers) != len(sizes) - 1 or numbers != sorted({*numbers}):
        raise UsageError(
            f"{where}: {KEY} must be rows with rising up_to, a number of images, and a last row "
            "without it"
        )
    return tuple(Row(row.get(_UP_TO), dict(_flat(row, where))) for row in rows)


def check(table: Table, where: str) -> None:
    """Raise ConfigError for a setting that is used before the training images are counted."""
    for key in setting_names(table):
        if key in _KNOWN_BEFORE or key.startswith("run."):
            raise ConfigError(
                f"{where}: {KEY} has {key}, which is needed before the training images are "
                f"counted; set it outside {KEY}, or by --{key}"
            )


def _flat(row: Mapping[str, Any], where: str) -> Iterable[tuple[str, Any]]:
    for section, fields in row.items():
        if section == _UP_TO:
            continue
        if not isinstance(fields, dict):
            raise UsageError(f"{where}: {KEY} has {section}, which must hold fields")
        for name, value in fields.items():
            yield f"{section}.{name}", value


def sections(row: Row) -> dict[str, dict[str, Any]]:
    """A row's settings as a config file has them."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in row.settings.items():
        section, _, name = key.partition(".")
        found.setdefault(section, {})[name] = value
    return found


def without_settings(table: Table, keys: Collection[str]) -> Table:
    """The table without these settings, which something else has set."""
    return tuple(
        Row(row.up_to, {key: value for key, value in row.settings.items() if key not in keys})
        for row in table
    )


def setting_names(table: Table) -> list[str]:
    """The settings (`section.field`) that it chooses."""
    return sorted({key for row in table for key in row.settings})


def choose(table: Table, num_images: int) -> Mapping[str, Any]:
    """The settings for a number of training images; a pure function. Empty without a table."""
    rows = (row for row in table if row.up_to is None or num_images <= row.up_to)
    return next((row.settings for row in rows), {})


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """A copy with these settings."""
    copied = copy.deepcopy(config)
    assign(copied, settings)
    return copied


def assign(config: Config, settings: Mapping[str, Any]) -> None:
    """Set fields by `section.field`."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        setattr(getattr(config, section), name, value)


def assign_earlier(config: Config, settings: Mapping[str, Any], run_url: str) -> None:
    """Set what an earlier start of the run chose.

    Raises:
        ConfigError: These settings are invalid: the run's config.yaml may come from anywhere.
    """
    assign(config, settings)
    try:
        check_config(config, starts_anew=False)
    except LightshipError as error:
        raise ConfigError(f"config.yaml of --run.output {redact(run_url)}: {error}") from None


def as_flags(settings: Mapping[str, Any]) -> str:
    """Settings as flags."""
    return " ".join(
        f"--{key} {str(value).lower() if isinstance(value, bool) else value}"
        for key, value in settings.items()
    )
