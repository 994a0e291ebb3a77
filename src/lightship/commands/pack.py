"""`lightship pack`: in this process alone; what is parallel there needs no processes."""

from lightship.commands.base import PackCommand
from lightship.data.shards.pack import pack as pack_shards
from lightship.distributed.signals import Phase, StopRequest
from lightship.training.callbacks.progress import build_progress


def pack(command: PackCommand) -> None:
    """Write the shards, or the rest of them. Blocks."""
    progress = build_progress(command.config.log_format)
    with StopRequest(Phase.PACK), progress.of_work("images") as show:
        pack_shards(command.source, command.destination, command.config, show)
