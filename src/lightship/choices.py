"""Settings that a fit chooses itself: by its number of training images, and by its net.

A config file has them under two keys, with the settings in sections as at its top:

- `by_train_images`: rows like {up_to: 500, trainer: {max_epochs: 30}}. The first row whose `up_to`
  is at least the number of training images gives its settings, and the last row, without `up_to`,
  those of every larger set.
- `without_batch_norm`: settings for a net that has no BatchNorm layers with running statistics, as
  most transformers. They win over those of a row.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightship.config import Config
from lightship.config import check as check_config
from lightship.errors import ConfigError, LightshipError, UsageError
from lightship.redaction import redact

BY_IMAGES, BY_NET = "by_train_images", "without_batch_norm"
_UP_TO = "up_to"
_KNOWN_BEFORE = (
    "data.root", "data.root_md5", "data.val_fraction", "trainer.accelerator", "trainer.devices",
    "trainer.timeout_s", "trainer.monitor",
)  # fmt: skip
"""Used to start the processes, open the run or count its training images; as is all of `run`."""
Settings = Mapping[str, Any]
"""`section.field` -> value."""


@dataclass(frozen=True)
class Row:
    """Settings of data sets up to a size.

    Attributes:
        up_to: Largest number of training images; None: any.
        settings: Those of such sets.
    """

    up_to: int | None
    settings: Settings


@dataclass(frozen=True)
class Choices:
    """What the config files of a command leave to be chosen; false if that is nothing.

    Attributes:
        by_train_images: The rows, in rising order of their sizes.
        without_batch_norm: Settings of a net without BatchNorm.
    """

    by_train_images: tuple[Row, ...] = ()
    without_batch_norm: Settings = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.by_train_images or self.without_batch_norm)

    @property
    def names(self) -> list[str]:
        """All settings that may be chosen."""
        return sorted({*self._names_by_images(), *self.without_batch_norm})

    def _names_by_images(self) -> set[str]:
        return {name for row in self.by_train_images for name in row.settings}

    def of_size(self, num_images: int) -> Settings:
        """The settings for a number of training images; empty without rows."""
        rows = (row for row in self.by_train_images if row.up_to is None or num_images <= row.up_to)
        return next((row.settings for row in rows), {})

    def changed(self, change: Callable[[Settings], Settings]) -> "Choices":
        """A copy with all its settings changed so."""
        rows = tuple(Row(row.up_to, change(row.settings)) for row in self.by_train_images)
        return Choices(rows, change(self.without_batch_norm))

    def without(self, names: Collection[str]) -> "Choices":
        """A copy without these settings, which something else has set."""
        return self.changed(
            lambda settings: {name: value for name, value in settings.items() if name not in names}
        )

    def over(self, earlier: "Choices") -> "Choices":
        """These over those of an earlier config file: rows replace all its rows."""
        kept = earlier.without(self._names_by_images()).without_batch_norm
        by_net = {**kept, **self.without_batch_norm}
        return Choices(self.by_train_images or earlier.by_train_images, by_net)


def take(content: dict[str, Any], where: str) -> Choices:
    """Remove the choices from a config file's content; their values are as the file has them.

    Raises:
        UsageError: They are of another form.
        ConfigError: A setting is used before it would be chosen.
    """
    rows, by_net = content.pop(BY_IMAGES, None), content.pop(BY_NET, None)
    found = Choices(
        () if rows is None else _rows(rows, where),
        {} if by_net is None else _flat(by_net, BY_NET, where),
    )
    _check_names(found, where)
    return found


def _rows(content: Any, where: str) -> tuple[Row, ...]:
    rows = content if isinstance(content, list) else []
    sizes = [row.get(_UP_TO) for row in rows if isinstance(row, dict)]
    is_right = len(sizes) == len(rows) > 0 and sizes[-1] is None
    numbers = [size for size in sizes[:-1] if type(size) is int and size > 0]
    if not is_right or len(numbers) != len(sizes) - 1 or numbers != sorted({*numbers}):
        raise UsageError(
            f"{where}: {BY_IMAGES} must be rows with rising up_to, a number of images, and a last "
            "row without it"
        )
    return tuple(
        Row(size, _flat({key: row[key] for key in row if key != _UP_TO}, BY_IMAGES, where))
        for size, row in zip(sizes, rows, strict=True)
    )


def _flat(content: Any, key: str, where: str) -> Settings:
    if not isinstance(content, dict):
        raise UsageError(f"{where}: {key} must hold sections of settings, as a config file does")
    return dict(_flat_items(content, key, where))


def _flat_items(content: Mapping[Any, Any], key: str, where: str) -> Iterable[tuple[str, Any]]:
    for section, fields in content.items():
        if not isinstance(fields, dict):
            raise UsageError(f"{where}: {key} has {section}, which must hold fields")
        for name, value in fields.items():
            yield f"{section}.{name}", value


def _check_names(choices: Choices, where: str) -> None:
    for name in choices.names:
        key = BY_NET if name in choices.without_batch_norm else BY_IMAGES
        reason = ""
        if name in _KNOWN_BEFORE or name.startswith("run."):
            reason = "is needed before the training images are counted"
        elif key == BY_NET and name == "model.net":
            reason = "is what it depends on"
        if reason:
            raise ConfigError(
                f"{where}: {key} has {name}, which {reason}; set it outside {key}, or by --{name}"
            )


def sections(settings: Settings) -> dict[str, dict[str, Any]]:
    """Settings as a config file has them."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        found.setdefault(section, {})[name] = value
    return found


def with_settings(config: Config, settings: Settings) -> Config:
    """A copy with these settings."""
    copied = copy.deepcopy(config)
    assign(copied, settings)
    return copied


def assign(config: Config, settings: Settings) -> None:
    """Set fields by `section.field`."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        setattr(getattr(config, section), name, value)


def assign_earlier(config: Config, settings: Settings, run_url: str) -> None:
    """Set what an earlier start of the run chose.

    Raises:
        ConfigError: These settings are invalid: the run's config.yaml may come from anywhere.
    """
    assign(config, settings)
    try:
        check_config(config, starts_anew=False)
    except LightshipError as error:
        raise ConfigError(f"config.yaml of --run.output {redact(run_url)}: {error}") from None


def as_flags(settings: Settings) -> str:
    """Settings as flags."""
    return " ".join(f"--{key} {_shown(value)}" for key, value in settings.items())


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
