"""A parsed command line: the command, its settings and its flags."""

from dataclasses import dataclass, field

from lightship.choices import Choices
from lightship.config import Config, PackConfig


@dataclass(frozen=True)
class Command:
    """A command with its settings and flags.

    Attributes:
        name: One of COMMANDS.
        config: Checked configuration.
        ckpt_path: `best`, `last` or the URL of a checkpoint; None: the command's default.
        predictions: URL of predict's table; None: under run.output.
        export: URL of export's file; None: under run.output.
        format: One of config.EXPORTS.
        wrong: Why doctor's configuration is invalid, which doctor reports as a check.
        is_on_its_data: Whether data.root is that of the run at run.output.
        named_net: model.net of the command line and its --config files, not of the run's own file:
            the only import path that is called without model.trust.
        given: Settings (`section.field`) of the command line and its --config files, not of the
            run's own file.
        choices: Settings that a fit chooses by the number of training images or by its net.
        only_prints_config: Whether to print the settings and exit.
    """

    name: str
    config: Config
    ckpt_path: str | None = None
    predictions: str | None = None
    export: str | None = None
    format: str = "torch"
    wrong: str = ""
    is_on_its_data: bool = False
    named_net: str = ""
    given: frozenset[str] = frozenset()
    choices: Choices = field(default_factory=Choices)
    only_prints_config: bool = False

    @property
    def is_fine_tuning(self) -> bool:
        """Whether it trains a net that has weights, or with settings that it chooses itself."""
        trains = self.name in ("fit", "doctor")
        return trains and bool(self.choices or self.config.model.weights)

    @property
    def prints(self) -> bool:
        """Whether what it writes to standard output is its result."""
        return self.name == "doctor" or self.only_prints_config

    @property
    def log_format(self) -> str:
        """Format of its log lines: auto, text or json."""
        return self.config.run.log_format

    @property
    def log_level(self) -> str:
        """Lowest level of the log lines shown: debug, info or warning."""
        return self.config.run.log_level


@dataclass(frozen=True)
class PackCommand:
    """`lightship pack`, which needs no run.

    Attributes:
        source: Images to read: anything that `--data.root` takes.
        destination: URL of the folder for the shards.
        config: Checked settings.
    """

    source: str
    destination: str
    config: PackConfig

    @property
    def log_format(self) -> str:
        """Format of its log lines: auto, text or json."""
        return self.config.log_format

    @property
    def log_level(self) -> str:
        """Lowest level of the log lines shown: debug, info or warning."""
        return self.config.log_level
