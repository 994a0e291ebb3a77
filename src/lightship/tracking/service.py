"""W&B's process (the only module that uses private names of wandb)."""

import contextlib
from typing import Any

from lightship.tracking.background import Background

_END_S = 5.0


def find_service() -> Any:
    """W&B's process; None if it has not started one, or wandb's private names have changed."""
    with contextlib.suppress(Exception):
        from wandb.sdk import wandb_setup

        connection: Any = wandb_setup.singleton().assert_service()
        return connection._proc._process
    return None


def end_service(process: Any = None) -> None:
    """Shut W&B down, ignoring its errors. Blocks for at most 5 s.

    Args:
        process: W&B's process, killed if given: after a failure, this process's exit would wait
            for it forever.
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
