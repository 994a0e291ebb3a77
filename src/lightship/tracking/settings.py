"""W&B's settings, from its variables and files, and their errors."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightship.errors import ConfigError
from lightship.tracking.key import read_key_file
from lightship.tracking.service import end_service, ignore_workspace_settings

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)
_OF_VARIABLES = {
    "api key": "WANDB_API_KEY",
    "run id": "WANDB_RUN_ID",
    "project": "WANDB_PROJECT",
    "wandb_service": "WANDB_SERVICE",
}


def known_settings(mode: str) -> "wandb.Settings":
    """W&B's settings from its variables and files. Blocks for the import; contacts no server.

    Raises:
        ConfigError: wandb is not installed, or one of its settings is invalid.
    """
    # W&B's reports about itself would start two threads here, and hold the exit of a process whose
    # server does not answer for 20 s. Read when wandb is imported.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"--run.tracking {mode} needs wandb, which is not installed ({error}); install it or "
            "set --run.tracking none"
        ) from error

    with as_config_errors(_OF_VARIABLES):
        if ignored := ignore_workspace_settings():
            logger.warning(
                f"W&B: {ignored} is not read, for anybody may have put it into the working "
                "directory; set WANDB_BASE_URL, WANDB_ENTITY or WANDB_PROJECT instead"
            )
        known = wandb.setup(settings=wandb.Settings(silent=True)).settings
        if key := read_key_file()[0]:  # not into a variable, which each child would inherit
            # With its server: W&B sends a key that comes without one to the default server.
            ours = wandb.Settings(silent=True, api_key=key, base_url=known.base_url)
            known = wandb.setup(settings=ours).settings
    token_path = known.identity_token_file
    if token_path and not os.access(token_path, os.R_OK):  # W&B's process would panic
        raise ConfigError(f"WANDB_IDENTITY_TOKEN_FILE {token_path} cannot be read")
    return known


def read_settings(mode: str) -> "wandb.Settings":
    """`known_settings` without a run: wandb's threads and service are shut down again."""
    try:
        return known_settings(mode)
    finally:
        end_service()


@contextlib.contextmanager
def as_config_errors(sources: dict[str, str]) -> Iterator[None]:
    """Turn W&B's error about a setting into a ConfigError that names the flag or variable.

    Args:
        sources: Words in W&B's error -> the flag or variable that they are about.
    """
    import wandb

    try:
        yield
    except (ValueError, wandb.errors.UsageError) as error:
        details: list[Any] = getattr(error, "errors", list)()  # pydantic's
        if details:
            text, setting = details[0]["msg"], str(next(iter(details[0]["loc"]), "a setting"))
            forms = (setting, setting.removeprefix("run_"), f"{setting}_file")
            names = [f"WANDB_{each}".upper() for each in forms]
            place = next((name for name in names if name in os.environ), None)
            if "key" not in setting:
                text = f"{details[0].get('input')!r}: {text}"
        else:
            text, setting = str(error), "a setting"
            place = next((name for words, name in sources.items() if words in text.lower()), None)
        where = place or f"{setting} of a WANDB_* variable or wandb's settings file"
        raise ConfigError(f"W&B refuses {where}: {' '.join(text.split())}") from error
