"""`lightship fit --print_config` of a fine-tuning: also what its data and weights decide."""

from lightship.commands.base import Command
from lightship.commands.choosing import choose
from lightship.console import streams
from lightship.data.splits import load_splits
from lightship.doctor.fine_tuning import plan
from lightship.errors import LightshipError
from lightship.models.preprocessing import adopt_by_name
from lightship.run import config_file
from lightship.storage import short_deadline


def print_config(command: Command) -> None:
    """Print the settings, and as comments what trains at which rate. Blocks, some seconds.

    A data set or weights that cannot be read are named in a comment, and the settings that they
    decide are printed as the command line has them.
    """
    config = command.config
    try:
        with short_deadline():
            train = load_splits(config.data, None, need="train")["train"]
            chosen = choose(command, len(train))
            adopt_by_name(config)
            lines = [f"{len(train):,} training images", plan(config, train.class_names)]
            if chosen:
                lines.append(chosen)
    except LightshipError as error:
        lines = [f"not complete: {error}"]
    streams.write_result(config_file.to_yaml(config))
    for line in lines:
        streams.write_result(f"# {' '.join(line.split())}")
