"""`lightship pack`: in this process alone; what is parallel there needs no processes."""

import signal
from types import FrameType

from lightship.commands.base import PackCommand
from lightship.data.shards.pack import pack as pack_shards
from lightship.distributed.signals import stop_signals
from lightship.errors import Preempted
from lightship.training.callbacks.progress import build_progress


def pack(command: PackCommand) -> None:
    """Write the shards, or the rest of them. Blocks."""
    numbers = stop_signals()
    before = [signal.signal(number, _stopped) for number in numbers]
    progress = build_progress(command.config.log_format)
    try:
        with progress.of_work("images") as show:
            pack_shards(command.source, command.destination, command.config, progress.note, show)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _stopped(number: int, frame: FrameType | None) -> None:
    raise Preempted(f"stopped by {signal.Signals(number).name}; rerun the command to resume")
