"""`lightship pack`: images into shards, in this process."""

from lightship.commands.base import PackCommand
from lightship.console.display import build_display
from lightship.console.work import work_progress
from lightship.data.shards.pack import pack as pack_shards
from lightship.distributed.signals import Phase, StopRequest


def pack(command: PackCommand) -> None:
    """Write the shards that are missing. Blocks."""
    display = build_display(command.config.log_format)
    with StopRequest(Phase.PACK), work_progress(display, "images") as show:
        pack_shards(command.source, command.destination, command.config, show)
