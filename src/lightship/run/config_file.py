"""A run's settings: `config.yaml` under its output, written at each start."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from lightship import __version__, storage, strict_yaml, versions
from lightship.config import Config, check_ranges
from lightship.errors import ConfigError, UsageError
from lightship.redaction import canonical

FILE = "config.yaml"
_FORMAT = "config.yaml"


def shown(config: Config) -> dict[str, Any]:
    """The resolved settings as plain values, without credentials in URLs."""
    return {
        section: {
            name: canonical(value) if isinstance(value, str) else value
            for name, value in fields.items()
        }
        for section, fields in dataclasses.asdict(config).items()
    }


def to_yaml(config: Config) -> str:
    """The resolved settings, without credentials, as YAML that `--config` reads."""
    # The version comes last: a file that was cut off lacks it.
    settings = {**shown(config), "version": versions.VERSIONS[_FORMAT]}
    del settings["model"]["trust"]  # the permission of one command
    return yaml.safe_dump(settings, sort_keys=False)


def write(output_url: str, config: Config) -> None:
    """Write the settings of a start. Rank 0; blocks."""
    storage.write_bytes(storage.join(output_url, FILE), to_yaml(config).encode())


def read(output_url: str) -> dict[str, dict[str, Any]]:
    """Section -> field -> value of the run at `output_url`, written by any version. Blocks.

    Raises:
        NotFound: There is none.
        ConfigError: It is damaged, or of a newer version.
    """
    where = storage.redact(storage.join(output_url, FILE))
    data = storage.read_small(storage.join(output_url, FILE), strict_yaml.MAX_BYTES)
    remedy = "restore the file, or give another --run.output"
    try:
        content = strict_yaml.load(data)
    except strict_yaml.YamlError as error:
        raise ConfigError(f"{where} {error}; {remedy}") from None
    sections = versions.complete(_checked(content, where, remedy))
    _check_values(sections, where, remedy)
    return sections


def _check_values(sections: Mapping[str, Mapping[str, Any]], where: str, remedy: str) -> None:
    """Raise ConfigError for a value whose type or range no start accepts."""
    for section in dataclasses.fields(Config):
        part = getattr(Config(), section.name)
        for name, value in sections[section.name].items():
            setattr(part, name, value)
        try:
            check_ranges(part, f"{section.name}.")
        except (ConfigError, UsageError) as error:
            raise ConfigError(f"{where}: {error}; {remedy}") from None


def _checked(content: Any, where: str, remedy: str) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{where} holds no settings; {remedy}")
    version = content.pop("version", None)
    versions.check(_FORMAT, version, where)
    known = dataclasses.asdict(Config())
    for section, fields in content.items():
        if section in known and not isinstance(fields, dict):
            raise ConfigError(f"{where}: {section} must hold fields; {remedy}")
        unknown = [section] if section not in known else set(fields) - set(known[section])
        for name in unknown:
            key = section if section not in known else f"{section}.{name}"
            raise ConfigError(
                f"{where} has the key {key}, which lightship {__version__} does not know: "
                f"if a newer one wrote it, upgrade lightship; else {remedy}"
            )
    keys = {f"{section}.{name}" for section, fields in content.items() for name in fields}
    if not version and (missing := versions.OLDEST - keys):
        raise ConfigError(f"{where} is damaged: it lacks {min(missing)}; {remedy}")
    return content
