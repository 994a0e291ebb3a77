"""The entry: parses a command and its configuration, then hands over. Imports no torch."""

import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from types import FrameType

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from lightship import __version__, config, streams, table
from lightship.config import Config, PackConfig
from lightship.exits import EXIT_CODES, ConfigError, LightshipError, UsageError
from lightship.flags import (
    COMMANDS,
    SECTIONS,
    build_pack_parser,
    build_parser,
    explain,
    nearest,
    recipe_names,
)
from lightship.signals import stop_signals

_FROM_THE_START = ("fit", "doctor")
"""Commands that need no run at run.output."""
_OF_A_RUN = (None, "best", "last")
"""Choices of --ckpt_path that are no checkpoint by themselves."""
_OF_ANOTHER_ROOT = {"data.root_md5": None}
"""A checksum is that of the root it was given with; another root comes with its own, or none."""


@dataclass(frozen=True)
class Command:
    """What was asked for.

    Attributes:
        name: One of COMMANDS.
        config: Checked configuration.
        ckpt_path: `best`, `last` or the URL of a checkpoint; None: the command's own choice.
        predictions: Where predict writes its table; None: under run.output.
        export: Where export writes its file; None: under run.output.
        format: One of config.EXPORTS.
        wrong: Why doctor's configuration is not valid; it tells of it among its checks.
    """

    name: str
    config: Config
    ckpt_path: str | None = None
    predictions: str | None = None
    export: str | None = None
    format: str = "torch"
    wrong: str = ""

    @property
    def log_format(self) -> str:
        """Of its lines: auto, text or json."""
        return self.config.run.log_format


@dataclass(frozen=True)
class PackCommand:
    """`lightship pack`, which needs no run.

    Attributes:
        source: What to read: all that `--data.root` takes.
        destination: URL or path of the folder of the shards.
        config: Checked settings.
    """

    source: str
    destination: str
    config: PackConfig

    @property
    def log_format(self) -> str:
        """Of its lines: auto, text or json."""
        return self.config.log_format


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the process's exit code (see exits.py)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        streams.set_up()
        # OpenMP's threads soon wait asleep (read when torch loads). Where others use the cores too,
        # a thread that spins keeps out the one that it waits for; docs/measurements.md has numbers.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        for number in stop_signals():
            # The imports take seconds, and a container's first process ignores what is not handled.
            signal.signal(number, _stop_at_once)
    command = None
    try:
        command = parse(arguments)
        if command is not None:
            from lightship import launch  # heavy: only once the command is known to be sound

            launch.launch(command, arguments)
        if command is None or (isinstance(command, Command) and command.name == "doctor"):
            streams.check_output()
    except LightshipError as error:
        _tell(error, "text" if command is None else command.log_format)
        return error.exit_code
    return 0


def _tell(error: LightshipError, log_format: str) -> None:
    """One line on standard error; what the other lines are for a program, so is this."""
    line = f"lightship: {error}"
    if log_format == "json":
        facts = {"event": "error", "exit_code": error.exit_code, "text": str(error)}
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **facts})
    print(line, file=sys.stderr, flush=True)


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    """End the process where nothing has to be saved."""
    streams.write_error(f"lightship: stopped by {signal.Signals(number).name}\n")
    os._exit(EXIT_CODES["preempted"].code)


def parse(arguments: list[str]) -> Command | PackCommand | None:
    """The command on the line, or None if help or the version was printed instead.

    Raises:
        UsageError: Unknown command, flag or type.
        ConfigError: A value out of its range, a config file that is not there.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return None
    if arguments[0] == "--version":
        print(f"lightship {__version__}")
        return None
    name = arguments[0]
    if name not in COMMANDS:
        raise UsageError(f"unknown command '{name}'{nearest(name, COMMANDS)}; see lightship --help")
    if name == "pack":
        return _parse_pack(arguments[1:])
    sources, flags = _split_configs(arguments[1:])
    if name not in _FROM_THE_START:
        sources = [*_kept_config(flags), *sources]
    elif not sources and not any(_is_flag(flag, "data.root") for flag in flags):
        sources = ["digits"]  # the embedded data set with the settings that suit it
    parser = build_parser(name)
    try:
        for source in sources:
            _apply_config(parser, source)
        if any(_is_flag(flag, "data.root") for flag in flags):
            parser.set_defaults(_OF_ANOTHER_ROOT)
        # jsonargparse reserves the name; it is in the parser for the help only.
        namespace = parser.parse_args([flag for flag in flags if flag != "--print_config"])
    except ArgumentError as error:
        raise UsageError(explain(str(error), parser)) from None
    except SystemExit:
        return None  # --help
    command = _command(name, namespace, sources)
    if "--print_config" in flags:
        print(config.to_yaml(command.config), end="")
        return None
    return command


def _parse_pack(arguments: list[str]) -> PackCommand | None:
    parser = build_pack_parser()
    try:
        given = vars(parser.parse_args(arguments))
    except ArgumentError as error:
        raise UsageError(explain(str(error), parser)) from None
    except SystemExit:
        return None  # --help
    source, destination = given.pop("SRC"), given.pop("DST")
    settings = PackConfig(**given)
    config.check_ranges(settings, "--")
    return PackCommand(source, destination, settings)


def read_config(source: str) -> str:
    """The text of a config: a shipped recipe by bare name, else a path or URL.

    Raises:
        ConfigError: It is not there.
    """
    if re.fullmatch(r"[\w-]+", source):
        if source in recipe_names():
            return (resources.files("lightship") / "recipes" / f"{source}.yaml").read_text()
        if not Path(source).exists():
            near = nearest(source, recipe_names())
            raise ConfigError(
                f"--config {source}: no such recipe{near}; there are {', '.join(recipe_names())}"
            )
    from lightship import storage

    try:
        return storage.read_bytes(source).decode()
    except storage.NotFound:
        raise ConfigError(f"--config {storage.redact(source)}: no such file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {storage.redact(source)} is not a text file") from None


def overview() -> str:
    """What `lightship --help` prints."""
    commands = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    return (
        f"lightship {__version__}: trains image classifiers with one command\n\n"
        "usage: lightship COMMAND [--config RECIPE|URL]... [--SECTION.FIELD VALUE]...\n\n"
        f"commands:\n{commands}\n\n"
        f"recipes:  {', '.join(recipe_names())}\n"
        f"sections: {', '.join(SECTIONS)}; `lightship COMMAND --help` lists every field\n\n"
        "examples:\n"
        "  lightship fit --config digits\n"
        "  lightship fit --config cifar10 --data.root s3://bucket/images "
        "--run.output s3://bucket/runs/1\n"
        "  lightship test --run.output s3://bucket/runs/1"
    )


def _apply_config(parser: ArgumentParser, source: str) -> None:
    """Make a config's values the parser's defaults, so that flags win wherever they stand."""
    shown = _shown(source)
    try:
        content = yaml.safe_load(read_config(source))
    except yaml.YAMLError as error:
        raise UsageError(f"--config {shown} is not YAML: {' '.join(str(error).split())}") from None
    content = {} if content is None else content
    if not isinstance(content, dict) or not set(content) <= set(SECTIONS):
        raise UsageError(f"--config {shown} must hold only the sections {', '.join(SECTIONS)}")
    for section, fields in content.items():
        if not isinstance(fields, dict):
            raise UsageError(f"--config {shown}: {section} must hold fields, as in '{section}:'")
    try:
        parser.parse_object(content)
    except ArgumentError as error:
        raise UsageError(f"--config {shown}: {explain(str(error), parser)}") from None
    values = {f"{part}.{key}": value for part in content for key, value in content[part].items()}
    parser.set_defaults({**(_OF_ANOTHER_ROOT if "data.root" in values else {}), **values})


def _split_configs(flags: list[str]) -> tuple[list[str], list[str]]:
    """The sources given by --config, and all other flags."""
    sources: list[str] = []
    rest: list[str] = []
    items = iter(flags)
    for item in items:
        if item == "--config":
            source = next(items, None)
            if source is None or source.startswith("--"):
                raise UsageError("--config needs a recipe, path or URL")
            sources.append(source)
        elif item.startswith("--config="):
            sources.append(item.partition("=")[2])
        else:
            rest.append(item)
    return sources, rest


def _kept_config(flags: list[str]) -> list[str]:
    """The run's own config.yaml, which a command on a finished run starts from."""
    from lightship import storage

    for index, flag in enumerate(flags):
        if _is_flag(flag, "run.output"):
            output = flag.partition("=")[2] or "".join(flags[index + 1 : index + 2])
            kept = storage.join(output, "config.yaml")
            if not storage.exists(kept):
                raise ConfigError(f"--run.output {storage.redact(output)} holds no run")
            return [kept]
    return []


def _command(name: str, namespace: Namespace, sources: list[str]) -> Command:
    settings = Config(**{key: cls(**vars(namespace[key])) for key, cls in SECTIONS.items()})
    wrong = ""
    try:
        config.check(settings)
    except ConfigError as error:
        if name != "doctor":
            raise
        wrong = str(error)
    kind, predictions = namespace.get("format", "torch"), namespace.get("predictions")
    if kind not in config.EXPORTS:
        raise UsageError(f"--format is '{kind}'; it must be one of {', '.join(config.EXPORTS)}")
    if predictions is not None:
        table.check_format(predictions, "--predictions")
    written = {"predict": predictions, "export": namespace.get("export")}
    if settings.run.output is None and name in written and namespace.ckpt_path not in _OF_A_RUN:
        if written[name] is None:
            flag = "predictions" if name == "predict" else name
            raise UsageError(f"lightship {name} needs --{flag}, or --run.output to write to")
    elif settings.run.output is None:
        if name not in _FROM_THE_START:
            raise UsageError(f"lightship {name} needs --run.output, the run to take the model from")
        title = re.sub(r"[^\w-]+", "-", Path(sources[-1]).stem) if sources else "run"
        settings.run.output = f"runs/{title}-{config.identity_hash(settings)}"
    urls = predictions, namespace.get("export")
    return Command(name, settings, namespace.ckpt_path, *urls, format=kind, wrong=wrong)


def _is_flag(item: str, *names: str) -> bool:
    return any(item == f"--{name}" or item.startswith(f"--{name}=") for name in names)


def _shown(source: str) -> str:
    """A config's name for messages, without what could be a credential in its URL."""
    return re.sub(r"//[^/@]*@", "//***@", source)
