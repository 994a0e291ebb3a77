"""W&B's own process (the one file that uses names that are private to wandb)."""

import contextlib
from typing import Any

from lightship.tracking.background import Background

_END_S = 5.0


def find_service() -> Any:
    """W&B's process, where it has started one, by names that are its own; None: not to be had."""
    with contextlib.suppress(Exception):
        from wandb.sdk import wandb_setup

        connection: Any = wandb_setup.singleton().assert_service()
        return connection._proc._process
    return None


def end_service(process: Any = None) -> None:
    """Free what W&B holds, in bounded time and whatever it raises. Blocks for seconds at most.

    Args:
        process: Its process, to be killed where it has failed: the end of this one would wait for
            it for ever.
    """

    def end() -> None:
        with contextlib.suppress(Exception, SystemExit):  # its process ended with another code
            import wandb

            wandb.teardown()

    if process is not None:
        process.kill()
    ending = Background("wandb-end")
    ending.submit(end)
    ending.wait(_END_S)
    ending.close()
