"""What a command line asks for: the command, its settings and its flags."""

from dataclasses import dataclass

from lightship.config import Config, PackConfig


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
        is_on_its_data: Whether data.root is that of the run that the command is on.
    """

    name: str
    config: Config
    ckpt_path: str | None = None
    predictions: str | None = None
    export: str | None = None
    format: str = "torch"
    wrong: str = ""
    is_on_its_data: bool = False

    @property
    def log_format(self) -> str:
        """Of its lines: auto, text or json."""
        return self.config.run.log_format

    @property
    def log_level(self) -> str:
        """Of the messages that are shown: debug, info or warning."""
        return self.config.run.log_level


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

    @property
    def log_level(self) -> str:
        """Of the messages that are shown: debug, info or warning."""
        return self.config.log_level
