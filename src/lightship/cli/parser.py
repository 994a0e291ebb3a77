"""Parsers of the commands' flags, built from config.py, and their error messages."""

import argparse
import copy
import difflib
import functools
import re
import typing
from collections.abc import Iterable
from importlib import resources

import jsonargparse
from jsonargparse import ArgumentParser

from lightship import config
from lightship.config import PackConfig

COMMANDS = {
    "fit": "train, then test the best checkpoint; rerun the command to resume",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "doctor": "check flags, data, storage and hardware before a fit",
    "predict": "write a table of predictions for unlabelled images",
    "export": "export a checkpoint as one file that runs without lightship",
    "pack": "write images of any layout as indexed tar shards; rerun the command to resume",
}
SECTIONS = {
    "run": config.RunConfig,
    "data": config.DataConfig,
    "model": config.ModelConfig,
    "optim": config.OptimConfig,
    "trainer": config.TrainerConfig,
}
FROM_THE_START = ("fit", "doctor")
"""Commands that need no existing run at run.output."""
DEFAULT_RECIPE = "digits"
"""What these run without --config and --data.root: on the embedded data set."""
EXAMPLES = {
    "run": ("output", "runs/1"),
    "data": ("root", "images"),
    "model": ("net", "resnet18"),
    "optim": ("name", "adamw"),
    "trainer": ("max_epochs", "5"),
}
"""Section -> its most usual field and a value, for errors."""


def build_pack_parser() -> ArgumentParser:
    """The parser of `lightship pack`."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="lightship pack",
        usage="lightship pack SRC DST [--FIELD VALUE]...",
        description=f"{COMMANDS['pack']}.",
        exit_on_error=False,
        allow_abbrev=False,  # an abbreviation may become ambiguous
    )
    parser.add_argument("SRC", type=str, help="URL, path or name, as for --data.root of fit")
    parser.add_argument(
        "DST",
        type=str,
        help="URL or path of the shards' folder, for --data.root of fit",
    )
    parser.add_class_arguments(PackConfig)
    for action in parser._actions:
        if action.dest in PackConfig.__dataclass_fields__:
            action.help = f"{action.help}{config.range_text(PackConfig, action.dest)}"
    return parser


def build_parser(name: str) -> ArgumentParser:
    """The parser of one command, built from the dataclasses of config.py.

    A copy for the caller, whose defaults it may set: to build another would take 20 times as long.
    """
    return copy.deepcopy(_built_parser(name))


@functools.cache
def _built_parser(name: str) -> ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"lightship {name}",
        usage=f"lightship {name} [--config RECIPE|URL]... [--SECTION.FIELD VALUE]...",
        description=f"{COMMANDS[name]}{_without_config(name)}",
        exit_on_error=False,
        allow_abbrev=False,  # an abbreviation may become ambiguous
    )
    parser.add_argument(
        "--config",
        help=f"recipe ({', '.join(recipe_names())}), or path or URL of a YAML file; repeatable: "
        "later files override earlier ones, and flags override files",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the resolved configuration and exit"
    )
    parser.add_argument(
        "--ckpt_path",
        type=str | None,
        help="best, last or the URL of a checkpoint (default: best; fit: the newest valid one)",
    )
    if name == "predict":
        parser.add_argument(
            "--predictions",
            type=str | None,
            help="URL of the table, .parquet, .csv or .jsonl (default: RUN.OUTPUT/predictions.csv)",
        )
    if name == "export":
        parser.add_argument("--format", type=str, default="torch", help="torch (.pt2) or onnx")
        where = "URL of the file (default: under RUN.OUTPUT/export/)"
        parser.add_argument("--export", type=str | None, help=where)
    for section, fields in SECTIONS.items():
        parser.add_class_arguments(fields, section)
    for action in parser._actions:
        section, _, field = action.dest.partition(".")
        if section in SECTIONS:
            if field:
                action.help = f"{action.help}{config.range_text(SECTIONS[section], field)}"
            else:
                action.help = argparse.SUPPRESS  # jsonargparse's per-section file
    return parser


def _without_config(name: str) -> str:
    text = f". Without --config and --data.root: the recipe {DEFAULT_RECIPE}"
    return text if name in FROM_THE_START else ""


def with_brackets(flags: list[str]) -> list[str]:
    """The flags with the value of each list as jsonargparse reads it: 128,160 as [128,160]."""
    lists = {
        f"--{section}.{name}"
        for section, fields in SECTIONS.items()
        for name, kind in typing.get_type_hints(fields).items()
        if any(typing.get_origin(part) is list for part in typing.get_args(kind))
    }
    found: list[str] = []
    for flag in flags:
        name, equals, value = flag.partition("=")
        is_value = not equals and found[-1:] and found[-1] in lists
        if is_value or (equals and name in lists):
            value = flag if is_value else value
            if re.fullmatch(r"[\d.]+(,[\d.]+)*", value):
                value = f"[{value}]"
            found.append(value if is_value else f"{name}={value}")
        else:
            found.append(flag)
    return found


def recipe_names() -> list[str]:
    """The recipes shipped in the package."""
    folder = resources.files("lightship") / "recipes"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml"))


def explain(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's message as one line that names the flag."""
    options = [option for action in parser._actions for option in action.option_strings]
    known = [option for option in options if option.removeprefix("--") not in SECTIONS]
    message = " ".join(message.split())
    if unknown := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        flag = unknown[1].partition("=")[0]
        kind = "flag" if flag.startswith("-") else "argument"
        near = nearest(flag, known, 0.8) or _nearest_field(flag, known)
        return f"unknown {kind} {flag}{near}; see {parser.prog} --help"
    if valueless := re.search(r"argument (--[\w.]+)\S*: expected one argument", message):
        return _about_value(valueless[1])
    if of_section := re.search(r'^Parser key "(\w+)": Unable to load config', message):
        return _about_section(of_section[1])
    if group := re.search(
        r"Group '([\w.]+)' does not accept (?:option|nested key) '([\w.]+)'", message
    ):
        flag = f"--{group[1]}.{group[2].removeprefix(group[1] + '.')}"
        return f"unknown key {flag[2:]}{nearest(flag, known)}"
    if wrong := re.search(r'Parser key "([\w.]+)":.*(?:Got value|Given value): (.*)$', message):
        section, _, field = wrong[1].rpartition(".")
        return f"--{wrong[1]} is '{wrong[2]}'; it must be {_type_text(section, field)}"
    if missing := re.search(r"the following arguments are required: (.*)$", message):
        return f"{missing[1]} missing; see {parser.prog} --help"
    return message


def _about_value(flag: str) -> str:
    section, _, field = flag.removeprefix("--").rpartition(".")
    if field in SECTIONS:
        return _about_section(field)
    is_setting = section or field in PackConfig.__dataclass_fields__
    return f"{flag} needs a value{f': {_type_text(section, field)}' if is_setting else ''}"


def _about_section(section: str) -> str:
    return f"--{section} is a section; did you mean --{section}.{EXAMPLES[section][0]}?"


def _type_text(section: str, field: str) -> str:
    """Of a setting; section "": of `lightship pack`."""
    return config.type_text(SECTIONS[section] if section else PackConfig, field)


def nearest(word: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """`; did you mean X?` if one of `known` is similar to the word, else ''."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=likeness)
    return f"; did you mean {close[0]}?" if close else ""


def _nearest_field(flag: str, known: Iterable[str]) -> str:
    """See `nearest`, by the field alone: other tools have --epochs, without a section."""
    section, _, word = flag.lstrip("-").replace("-", "_").rpartition(".")
    known = [option for option in known if "." in option]
    for options in ([o for o in known if o.startswith(f"--{section}.")], known):
        fields = {option.rpartition(".")[2]: option for option in options}
        exact = [field for field in fields if field == word]
        within = [field for field in fields if word in field]
        if likely := exact or within[:2] or difflib.get_close_matches(word, fields, n=2):
            return f"; did you mean {' or '.join(fields[field] for field in likely)}?"
    return ""
