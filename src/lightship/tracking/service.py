"""W&B's process (the only module that uses private names of wandb)."""

import contextlib
import os
from pathlib import Path
from typing import Any

from lightship.errors import ConfigError
from lightship.tracking.background import Background

_END_S = 5.0


def ignore_workspace_settings() -> str | None:
    """Have W&B read no file of the working directory, which may be anybody's.

    `wandb/settings` names the server that gets the API key, a proxy, headers;
    `config-defaults.yaml` adds to a run's config. The user's own file, in WANDB_CONFIG_DIR, and
    variables are read. Before the first `wandb.setup`.

    Returns:
        The settings file, where there is one.

    Raises:
        ConfigError: There is such a file, and this version of wandb would read it.
    """
    import wandb
    from wandb.sdk.wandb_config import Config

    names = ("wandb/settings", ".wandb/settings", "config-defaults.yaml")
    found = [str(Path(name).absolute()) for name in names if Path(name).is_file()]
    is_known = hasattr(Config, "_load_defaults") and hasattr(wandb.Settings, "settings_workspace")
    if found and not is_known:
        raise ConfigError(
            f"wandb {wandb.__version__} would read {found[0]}, which anybody may have put into "
            "the working directory: remove it, or set --run.tracking none"
        )
    Config._load_defaults = lambda self: None  # type: ignore[method-assign]
    wandb.Settings.settings_workspace = property(lambda self: os.devnull)  # type: ignore[assignment]
    return next((path for path in found if path.endswith("settings")), None)


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
