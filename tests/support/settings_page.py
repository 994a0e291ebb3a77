"""docs/settings.md, generated from config.py: `python -m tests.support.settings_page`."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docstring_parser import parse_from_object

from lightship.cli.parser import SECTIONS
from lightship.config import Config, PackConfig, identity

PAGE = Path(__file__).parents[2] / "docs/settings.md"
_TAIL = Path(__file__).with_name("settings_tail.md")
"""What no setting says: flags of single commands, environment variables."""
_HEAD = """# Settings

Generated from `src/lightship/config.py` by `make docs`; `lightship fit --help` prints the same.

A setting is a flag (`--data.flip true`) or a key of a YAML file (`data: {flip: true}`). Flags
override files, later files override earlier ones. Every command except `pack` takes these flags.
`fit` without `--config` and `--data.root` runs the recipe `digits`.

Settings marked \\* affect training: they enter the hash of a run's default name and cannot change
when the run is resumed.
"""


def text() -> str:
    """The page."""
    training = set(identity(Config()))
    parts = [_HEAD]
    for name, section in SECTIONS.items():
        table = _table(section, f"{name}.", training)
        parts.append(f"## {name}\n\n{section.__doc__}\n\n{table}")
    parts.append(
        "## lightship pack\n\n`lightship pack SRC DST` has flags of its own.\n\n"
        f"{_table(PackConfig, '', set())}"
    )
    parts.append(_TAIL.read_text())
    return "\n".join(parts)


def _table(section: type, prefix: str, training: set[str]) -> str:
    help_of = {item.arg_name: item.description for item in parse_from_object(section).params}
    rows = ["| flag | value | default | |", "| --- | --- | --- | --- |"]
    for item in dataclasses.fields(section):
        flag = f"{prefix}{item.name}"
        mark = " \\*" if flag in training else ""
        words = " ".join((help_of[item.name] or "").split())
        value = f"{_kind(section, item.name)}{_bounds(item.metadata)}"
        rows.append(f"| `--{flag}`{mark} | {value} | {_default(item.default)} | {words} |")
    return "\n".join(rows) + "\n"


def _kind(section: type, name: str) -> str:
    kind = typing.get_type_hints(section)[name]
    if typing.get_origin(kind) is typing.Literal:
        return _plain(kind)
    return " or ".join(_plain(part) for part in typing.get_args(kind) or (kind,))


def _plain(kind: typing.Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"list of {typing.get_args(kind)[0].__name__}"
    return "null" if kind is type(None) else kind.__name__


def _bounds(meta: Mapping[str, Any]) -> str:
    low, high, unit = (meta.get(name) for name in ("at_least", "at_most", "unit"))
    if low is None:
        return ""
    bounds = f"≥ {low:,.10g}" if high is None else f"{low:,.10g} to {high:,.10g}"
    return f", {bounds} {unit}".rstrip()


def _default(value: Any) -> str:
    return f"`{json.dumps(value) if value is None or isinstance(value, bool) else value}`"


if __name__ == "__main__":
    PAGE.write_text(text())
