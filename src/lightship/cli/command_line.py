"""Parses a command line, its config files and recipes into a `Command`. Imports no torch."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from lightship import __version__, choices, config, strict_yaml, versions
from lightship.cli.parser import (
    COMMANDS,
    DEFAULT_RECIPE,
    EXAMPLES,
    FROM_THE_START,
    SECTIONS,
    build_pack_parser,
    build_parser,
    explain,
    nearest,
    recipe_names,
    with_brackets,
)
from lightship.commands.base import Command, PackCommand
from lightship.config import Config, PackConfig
from lightship.console import streams
from lightship.data.names import printable
from lightship.errors import ConfigError, LightshipError, UsageError
from lightship.predict import table
from lightship.redaction import canonical, is_redacted, learn, redact

_OF_A_RUN = (None, "best", "last")
"""Values of --ckpt_path that name a checkpoint of the run."""
_CHOICES = "choices"
"""Key of a namespace for the settings that a fit chooses itself."""
_GIVEN = "given"
"""Likewise, for those that the flags and --config files hold."""
_FLAGGED = "flagged"
"""Likewise, for those of the flags alone."""
_OF_TRAINING = {
    "model.weights": "takes its weights from a checkpoint: leave it out. For another checkpoint: "
    "--ckpt_path",
    "model.compile": "does not compile the net: leave it out",
}
"""Settings that a command on a model would ignore -> what it does instead."""
_MD5 = "data.root_md5"
_NUMBER_OR_TEXT = {"devices"}
"""Fields whose text may be a number, which YAML reads as such."""
_Sections = Mapping[str, Mapping[str, Any]]
"""Section -> field -> value, as a config file has them."""


def parse(arguments: list[str]) -> Command | PackCommand | None:
    """The command on the line, or None if help or the version was printed instead.

    Raises:
        UsageError: Unknown command, flag or type.
        ConfigError: A value out of range, or a missing config file.
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
    for item in arguments:
        if printable(item) != item:  # could not be stored in the run's files
            raise ConfigError(f"{printable(item)} is not UTF-8; rename it")
    if name == "pack":
        return _parse_pack(arguments[1:])
    sources, flags = _split_configs(arguments[1:])
    is_help = any(flag in ("-h", "--help") for flag in flags)  # which has the settings' defaults
    if name in FROM_THE_START and not (sources or _gives_root(flags) or is_help):
        sources = [DEFAULT_RECIPE]
    namespace = _parsed(name, sources, flags)
    own, named = None, namespace
    if namespace is not None and name not in FROM_THE_START and namespace.run.output:
        own = _settings_of_run(namespace.run.output)
        namespace = _parsed(name, sources, flags, own)
    if namespace is None or named is None:
        return None  # --help
    try:
        command = _command(name, namespace, sources, own)
        _refuse_publishing(command, named.data.root)
    except LightshipError as error:
        error.log_format = namespace.run.log_format
        raise
    command = dataclasses.replace(command, named_net=named.model.net)
    if "--print_config" in flags and command.is_fine_tuning:
        return dataclasses.replace(command, only_prints_config=True)
    if "--print_config" in flags:
        from lightship.run import config_file

        streams.write_result(config_file.to_yaml(command.config))
        return None
    return command


def _parsed(
    name: str, sources: list[str], flags: list[str], own: _Sections | None = None
) -> Namespace | None:
    """The settings of a command; None if its help was printed.

    Args:
        name: Of the command.
        sources: Values of --config; later ones override earlier ones.
        flags: All other flags, which override files.
        own: Settings of the run at run.output, which all others override.
    """
    parser = build_parser(name)
    try:
        if own is not None:
            _set_defaults(parser, own, "config.yaml of --run.output", ConfigError)
        left_open = choices.Choices()
        layers = []
        for source in sources:
            left_open, values = _apply_config(parser, source, left_open)
            layers.append(values)
        # jsonargparse reserves the name; the parser has it only for the help.
        flags = with_brackets([flag for flag in flags if flag != "--print_config"])
        namespace = parser.parse_args(flags)
        flagged = vars(parser.parse_args(flags, defaults=False).as_flat())
        layers.append(flagged)
        if _is_of_another_root([*([_flat(own)] if own else []), *layers], namespace.data.root):
            namespace.data.root_md5 = None
        namespace[_CHOICES] = left_open.without(flagged.keys())
        namespace[_GIVEN] = frozenset().union(*layers)
        namespace[_FLAGGED] = frozenset(flagged)
        return namespace
    except ArgumentError as error:
        raise UsageError(explain(str(error), parser)) from None
    except RecursionError:
        raise UsageError("the value of a flag is nested too deeply") from None
    except SystemExit:
        return None


def _flat(content: _Sections) -> dict[str, Any]:
    return {f"{part}.{key}": value for part in content for key, value in content[part].items()}


def _is_of_another_root(layers: Sequence[Mapping[str, Any]], root: str) -> bool:
    """Whether data.root_md5 came with another root than the one that is read.

    Args:
        layers: `section.field` -> value of each source of settings; later ones override earlier.
        root: data.root of all of them.
    """
    of = next((layer.get("data.root") for layer in reversed(layers) if _MD5 in layer), None)
    return of is not None and not config.is_same_root(str(of), str(root))


def _settings_of_run(output: str) -> _Sections:
    from lightship import storage
    from lightship.run import config_file

    try:
        return config.of_run(config_file.read(output))
    except storage.NotFound:
        raise ConfigError(f"--run.output {storage.redact(output)} holds no run") from None


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
        ConfigError: It does not exist.
    """
    if re.fullmatch(r"[\w-]+", source):
        if source in recipe_names():
            return (resources.files("lightship") / "recipes" / f"{source}.yaml").read_text()
        if not os.path.exists(source):  # False also for an invalid file name
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
        f"          (fit without --config and --data.root: {DEFAULT_RECIPE})\n"
        f"sections: {', '.join(SECTIONS)}; `lightship COMMAND --help` lists every field\n\n"
        "examples:\n"
        "  lightship fit --config digits\n"
        "  lightship fit --config finetune --data.root s3://bucket/images "
        "--run.output s3://bucket/runs/1\n"
        "  lightship test --run.output s3://bucket/runs/1"
    )


def _apply_config(
    parser: ArgumentParser, source: str, earlier: choices.Choices
) -> tuple[choices.Choices, dict[str, Any]]:
    """Set a config's values as the parser's defaults, so that flags override them.

    Args:
        parser: Of the command.
        source: Value of --config.
        earlier: The choices of the configs before.

    Returns:
        The choices of this config over those before, less the settings of this config. And these
        settings, as `section.field` -> value.
    """
    shown = f"--config {redact(source)}"
    try:
        text = read_config(source)
        learn(*text.splitlines())  # an error quotes them
        content = strict_yaml.load(text)
        learn(content)
    except strict_yaml.YamlError as error:
        raise UsageError(f"{shown} {error}") from None
    content = {} if content is None else content
    if isinstance(content, dict):
        versions.check("config.yaml", content.pop("version", None), shown)
        own = _choices(parser, content, shown)
    _check_sections(content, shown)
    for fields in content.values():
        for name in fields.keys() & _NUMBER_OR_TEXT:
            fields[name] = str(fields[name]) if type(fields[name]) is int else fields[name]
    _set_defaults(parser, content, shown)
    values = _flat(content)
    return own.over(earlier.without(values.keys())), values


def _check_sections(content: Any, where: str) -> None:
    """Raise UsageError if a config is anything but sections with fields."""
    if not isinstance(content, dict):
        raise UsageError(f"{where} must hold the sections {', '.join(SECTIONS)}")
    for section, fields in content.items():
        if section not in SECTIONS:
            raise UsageError(
                f"{where}: unknown section {section!r:.80}{nearest(str(section), SECTIONS)}; the "
                f"sections are {', '.join(SECTIONS)}"
            )
        if not isinstance(fields, dict):
            example = ": ".join(EXAMPLES[section])
            raise UsageError(
                f"{where}: {section} must hold fields, such as {section}: {{{example}}}"
            )


def _choices(parser: ArgumentParser, content: dict[str, Any], where: str) -> choices.Choices:
    """The choices of a config, removed from its content, with values of the settings' types."""

    def typed(settings: choices.Settings) -> choices.Settings:
        parsed = _parse(parser, choices.sections(settings), where)
        return {key: parsed[key] for key in settings}

    return choices.take(content, where).changed(typed)


def _set_defaults(
    parser: ArgumentParser,
    content: _Sections,
    where: str,
    wrong: type[LightshipError] = UsageError,
) -> None:
    _parse(parser, content, where, wrong)
    parser.set_defaults(_flat(content))


def _parse(
    parser: ArgumentParser,
    content: _Sections,
    where: str,
    wrong: type[LightshipError] = UsageError,
) -> Namespace:
    """All settings, with those of `content` converted to their types.

    Raises `wrong` for a key that does not exist or a value of another type.
    """
    try:
        return parser.parse_object(content)
    except ArgumentError as error:
        raise wrong(f"{where}: {explain(str(error), parser)}") from None


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


def _command(name: str, namespace: Namespace, sources: list[str], own: _Sections | None) -> Command:
    settings = Config(**{key: cls(**vars(namespace[key])) for key, cls in SECTIONS.items()})
    given_root, settings.data.root = settings.data.root, config.plain_root(settings.data.root)
    wrong = ""
    trains = name in FROM_THE_START
    starts_anew = trains and namespace.get("ckpt_path") is None
    try:
        _check_choices(namespace[_CHOICES], settings, starts_anew, trains)
        config.check(settings, starts_anew, trains)
        _check_complete(name, settings)
        if not trains:
            _refuse_ignored(name, namespace, own)
        if name == "validate" and own is not None:
            _check_split(settings, own)
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
    if settings.run.output == "":
        raise UsageError("--run.output is empty; it must be a path or URL")
    if settings.run.output is None and name in written and namespace.ckpt_path not in _OF_A_RUN:
        if written[name] is None:
            flag = "predictions" if name == "predict" else name
            raise UsageError(f"lightship {name} without a run needs --{flag}, the file to write")
    elif settings.run.output is None:
        if name not in FROM_THE_START:
            raise UsageError(f"lightship {name} needs --run.output, the run to take the model from")
        source = canonical(sources[-1]).partition("?")[0] if sources else "run"
        title = re.sub(r"[^\w-]+", "-", Path(source).stem)
        settings.run.output = _default_output(title, settings, given_root)
    return Command(
        name,
        settings,
        namespace.ckpt_path,
        predictions,
        namespace.get("export"),
        format=kind,
        wrong=wrong,
        given=namespace[_GIVEN],
        choices=namespace[_CHOICES],
        is_on_its_data=own is not None
        and config.is_same_root(str(own["data"]["root"]), settings.data.root),
    )


def _check_choices(
    left_open: choices.Choices, settings: Config, starts_anew: bool, trains: bool
) -> None:
    """Raise ConfigError for what may be chosen and is invalid.

    Of what the net decides only the ranges: with the net, and the rest, it is checked once chosen.
    """
    for row in left_open.by_train_images:
        config.check(choices.with_settings(settings, row.settings), starts_anew, trains)
    by_net = choices.with_settings(settings, left_open.without_batch_norm)
    for section in choices.sections(left_open.without_batch_norm):
        config.check_ranges(getattr(by_net, section), f"--{section}.")


def _refuse_publishing(command: Command, named_root: str) -> None:
    """Raise ConfigError if a remote run chose the local images whose names a remote table gets."""
    root, output = command.config.data.root, command.config.run.output or ""
    if command.name != "predict" or root in (config.plain_root(named_root), *config.NAMED_SETS):
        return
    from lightship import storage

    table = command.predictions or output
    if storage.is_remote(output) and storage.is_remote(table) and not storage.is_remote(root):
        raise ConfigError(
            f"--data.root is {root} by the run's own settings, and --run.output is not on this "
            f"machine: to write the names of its images there, add --data.root {root}"
        )


def _refuse_ignored(name: str, namespace: Namespace, own: _Sections | None) -> None:
    """Raise ConfigError for a setting that this command on a model would ignore.

    A --config file may be that of the training: of a run its values are known, of a checkpoint
    alone they are not, and only flags are compared.
    """
    given = namespace[_GIVEN if own else _FLAGGED]
    before = _flat(own) if own else {}
    for key, instead in _OF_TRAINING.items():
        value = namespace[key]
        is_set = key in given and value not in (None, "none")
        if is_set and canonical(value) != canonical(before.get(key) or ""):
            raise ConfigError(f"--{key} is {canonical(value)}; lightship {name} {instead}")


def _check_split(settings: Config, own: _Sections) -> None:
    """Raise ConfigError if training images of the run would be in the validation split."""
    was, now = own["data"]["val_fraction"], settings.data.val_fraction
    if now != was and config.is_same_root(str(own["data"]["root"]), settings.data.root):
        raise ConfigError(
            f"--data.val_fraction is {now:g}, and the run held out {was:g}: it has trained on "
            f"images of that split. Leave it out, or set {was:g}"
        )


def _default_output(title: str, settings: Config, given_root: str) -> str:
    """Default of run.output: named by a hash of the settings that affect training."""
    output = f"runs/{title}-{versions.identity_hash(settings)}"
    # 0.1.0 hashed a trailing slash of data.root too: resume such a run.
    before = f"runs/{title}-{versions.identity_hash(settings, given_root)}"
    return before if Path(before, "config.yaml").exists() else output


def _gives_root(flags: list[str]) -> bool:
    return any(_is_flag(flag, "data.root") for flag in flags)


def _is_flag(item: str, *names: str) -> bool:
    return any(item == f"--{name}" or item.startswith(f"--{name}=") for name in names)


def _check_complete(name: str, settings: Config) -> None:
    """Raise ConfigError for a URL that this command reads and that comes from where none is kept.

    A run's config.yaml holds no passwords and no signatures.
    """
    urls = {"--data.root": settings.data.root if name != "export" else None}
    if name in FROM_THE_START:
        urls |= {"--model.weights": settings.model.weights}
    for flag, url in urls.items():
        if is_redacted(url):
            raise ConfigError(
                f"{flag} {url} comes from a stored configuration, which holds no passwords and "
                f"signatures: give {flag} with them"
            )
