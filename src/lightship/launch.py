"""How many processes a command runs in, and what their end means to the caller."""

from lightship import run
from lightship.cli import Command


def launch(command: Command) -> None:
    """Run the command in this process. Blocks until it is done.

    Raises:
        LightshipError: With the exit code of the contract.
    """
    getattr(run, command.name)(command)
