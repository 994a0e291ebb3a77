"""The start of a W&B run, online or offline, or none."""

import logging
import os
import re
import secrets
import string
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightship.errors import ConfigError, in_one_line
from lightship.safe_text import shown
from lightship.tracking.background import Background
from lightship.tracking.folders import WandbFolders
from lightship.tracking.key import find_key
from lightship.tracking.service import end_service, find_service
from lightship.tracking.settings import as_config_errors, known_settings
from lightship.tracking.tracker import Timeouts, Tracker

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)
_NAME_LETTERS = _ID_LETTERS = 128
_PROJECT = "lightship"
_IMPORT_S = _INIT_S = 60.0
"""Max wait for wandb's import and process, and for a run beyond the wait for its server."""


def run_id(stored: str | None = None) -> str:
    """The W&B id of a run: WANDB_RUN_ID, else `stored`, else 8 random characters of 0-9a-z.

    Args:
        stored: The id that an earlier start kept; ignored if W&B would refuse it.
    """
    letters = string.ascii_lowercase + string.digits
    new_id = "".join(secrets.choice(letters) for _ in range(8))
    if stored is not None and not is_run_id(stored):
        stored = None
    return os.environ.get("WANDB_RUN_ID") or stored or new_id


def is_run_id(text: str) -> bool:
    """Whether W&B takes a text as a run's id, and it is no damaged file's (U+FFFD)."""
    is_text = text.isprintable() and text == text.strip() and 1 <= len(text) <= _ID_LETTERS
    return is_text and not re.search(r"[:;,#?/'\ufffd]", text)


class Preparation:
    """W&B being imported and its process started, which takes most of a start. Rank 0.

    Does not block; `start_tracking` raises its errors.

    Args:
        mode: Online where possible (auto), or offline.
        scratch_path: Local folder for wandb's files.
    """

    def __init__(self, mode: Literal["auto", "offline"], scratch_path: Path) -> None:
        self.mode, self.calls, self.is_used = mode, Background("wandb-calls"), False
        self.ready = self.calls.begin(partial(_prepare, mode, scratch_path))

    def close(self) -> None:
        """End what no run has used: the thread, W&B's process, temporary folders."""
        if self.is_used:
            return
        self.calls.close()
        if self.ready.done() and not self.ready.exception():
            self.ready.result()[0].remove()
            end_service()


def _prepare(mode: str, scratch_path: Path) -> "tuple[WandbFolders, wandb.Settings]":
    folders = WandbFolders(scratch_path)
    return folders, known_settings(mode)


def prepare_tracking(
    mode: Literal["auto", "offline", "none"], scratch_path: Path
) -> Preparation | None:
    """Begin what `start_tracking` needs; None for mode none: wandb is then not imported."""
    return None if mode == "none" else Preparation(mode, scratch_path)


def start_tracking(
    preparation: Preparation | None,
    project: str | None,
    run_id: str,
    name: str,
    config: dict[str, Any],
    mirror_url: str | None = None,
    init_timeout_s: float = 30.0,
    finish_timeout_s: float = 20.0,
) -> Tracker | None:
    """Start or resume the W&B run `run_id` in the background. Rank 0, before training.

    Blocks until wandb is imported and its settings are checked, and prompts for nothing. The run is
    online if there is a key (WANDB_API_KEY, or the netrc entry of WANDB_BASE_URL's host) and the
    server answers, else offline; one line says which, and how to upload it.

    Args:
        preparation: Of `prepare_tracking`.
        project: W&B project; None: WANDB_PROJECT, else lightship.
        run_id: The same over all restarts of a run (see `run_id`).
        name: Display name, where WANDB_NAME gives none.
        config: Shown by W&B as the run's config; plain values.
        mirror_url: Where an offline run is copied to, now and then and at the end.
        init_timeout_s: Max wait for the server at the start.
        finish_timeout_s: Max wait at the end; less than Kubernetes' default grace period (30 s),
            so that a preempted pod still finishes.

    Returns:
        None without a preparation, for WANDB_MODE=disabled and, with a warning, if W&B cannot be
        imported and set up.

    Raises:
        ConfigError: wandb is not installed, or one of its settings is invalid.
    """
    if preparation is None:
        return None
    if project is None:
        project = os.environ.get("WANDB_PROJECT") or _PROJECT
    elif not project.strip():
        raise ConfigError("--run.project is empty; it must name a W&B project")
    shown_name = None if os.environ.get("WANDB_NAME") else _shown_name(name)
    start = _Start(project, run_id, shown_name, config, init_timeout_s, finish_timeout_s)
    preparation.is_used = True
    calls = preparation.calls
    try:
        checked = calls.result(partial(_check, start, preparation), _IMPORT_S)
    except (Exception, SystemExit) as error:
        calls.close()
        end_service(find_service())
        if isinstance(error, ConfigError):
            raise
        logger.warning(f"W&B cannot be started ({in_one_line(error)}); training without tracking")
        return None
    if checked is None:
        calls.close()
        return None
    timeouts = Timeouts(2 * init_timeout_s + _INIT_S, finish_timeout_s)
    init = partial(_init, start, checked)
    return Tracker(init, project, run_id, calls, checked.folders, mirror_url, timeouts)


class _Start(NamedTuple):
    """What a W&B run is started with."""

    project: str
    run_id: str
    name: str | None
    config: dict[str, Any]
    init_timeout_s: float
    finish_timeout_s: float

    def settings(self, mode: Literal["online", "offline"]) -> "wandb.Settings":
        """W&B's settings. Raises ConfigError if W&B does not take the project or the id."""
        import wandb

        with as_config_errors({"project": "--run.project", "run id": "WANDB_RUN_ID"}):
            return wandb.Settings(
                mode=mode,
                project=self.project,
                run_id=self.run_id,
                silent=True,
                # No capture of stdout: it would sit between the progress bar and its terminal.
                console="off",
                # Our bounded look at git, in place of wandb's unbounded one.
                disable_git=True,
                disable_code=True,
                init_timeout=self.init_timeout_s,
                finish_timeout=self.finish_timeout_s,
                finish_timeout_raises=True,
                # System metrics stay on: they are sampled every 15 s in wandb's own process, and
                # the GPU's are what one opens W&B for.
                x_disable_stats=False,
            )

    def init(self, mode: Literal["online", "offline"], root_path: Path) -> "wandb.Run":
        """Start it. Blocks for at most about `init_timeout_s`."""
        import wandb

        return wandb.init(
            project=self.project,
            id=self.run_id,
            name=self.name,
            dir=root_path,
            resume="allow",
            config=self.config,
            allow_val_change=True,
            settings=self.settings(mode),
        )


class _Checked(NamedTuple):
    """What is known of a W&B run before it is started."""

    folders: WandbFolders
    server: str
    why_offline: str
    """Empty: the server is asked."""


def _check(start: _Start, preparation: Preparation) -> _Checked | None:
    """Check W&B's settings, once it is imported; None if its own variables disable it.

    Raises:
        ConfigError: See `start_tracking`.
    """
    folders, known = preparation.ready.result()
    if known.mode == "disabled":
        return None
    folders.root_path.mkdir(parents=True, exist_ok=True)
    start.settings("offline")
    why_offline = "as asked"
    if preparation.mode == "auto" and known.mode not in ("offline", "dryrun"):
        _, why_offline = find_key(known.base_url, known.api_key or known.identity_token_file)
    return _Checked(folders, known.base_url, why_offline)


def _init(start: _Start, checked: _Checked) -> "tuple[wandb.Run, str]":
    """Start the run, online if it can be; with it, why it is offline."""
    root_path, why_offline = checked.folders.root_path, checked.why_offline
    if not why_offline:
        try:
            return start.init("online", root_path), ""
        except Exception as error:
            import wandb

            wandb.teardown()  # or the id counts as in use
            why_offline = f"{checked.server}: {in_one_line(error)}"
    return start.init("offline", root_path), why_offline


def _shown_name(name: str) -> str:
    """A run's name as W&B takes it."""
    return shown(name)[:_NAME_LETTERS]
