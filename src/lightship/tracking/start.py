"""The start of a W&B run, online or offline, or none."""

import os
import re
import secrets
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightship.errors import ConfigError, in_one_line
from lightship.tracking.background import Background
from lightship.tracking.folders import WandbFolders
from lightship.tracking.key import find_key
from lightship.tracking.service import end_service, find_service
from lightship.tracking.settings import as_config_errors, known_settings
from lightship.tracking.tracker import STEP_KEY, Tracker

if TYPE_CHECKING:
    import wandb

_NAME_LETTERS = 128
_START_S = 60.0


def _print_note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_id(stored: str | None = None) -> str:
    """The W&B id of a run: WANDB_RUN_ID, else the one that an earlier start has kept, else a new.

    Args:
        stored: the id that an earlier start has kept; one that W&B does not take counts as none.

    Returns:
        The id; a new one is 8 random characters of 0-9a-z.
    """
    letters = string.ascii_lowercase + string.digits
    new_id = "".join(secrets.choice(letters) for _ in range(8))
    if stored is not None and not re.fullmatch(r"[\w.-]+", stored):
        stored = None
    return os.environ.get("WANDB_RUN_ID") or stored or new_id


def start_tracking(
    mode: Literal["auto", "offline", "none"],
    project: str,
    run_id: str,
    name: str,
    config: dict[str, Any],
    scratch_path: Path,
    environment: dict[str, Any] | None = None,
    note: Callable[[str], None] = _print_note,
    mirror_url: str | None = None,
    init_timeout_s: float = 30.0,
    finish_timeout_s: float = 20.0,
) -> Tracker | None:
    """Start, or go on with, the W&B run `run_id`. Rank 0 alone calls it, before training.

    Blocks at most about `init_timeout_s`, and prompts for nothing: with a key (WANDB_API_KEY, or
    the netrc entry of WANDB_BASE_URL's host) the run is online, without one or when the server does
    not answer it is offline. `note` is given one line that says which, and how to sync, or that W&B
    cannot be started: the run then goes on without.

    Args:
        mode: online where possible (auto), offline, or none (wandb is then not imported).
        project: W&B project.
        run_id: the same over all restarts of a run (see `run_id`).
        name: what W&B shows.
        config: the resolved settings, plain values.
        scratch_path: local folder under which wandb keeps its files.
        environment: facts about the machine, logged beside `config`; its `git_commit` becomes the
            run's.
        note: where the one line goes.
        mirror_url: where the folder of an offline run is copied to, now and then and at the end.
        init_timeout_s: bound of the wait for the server at the start.
        finish_timeout_s: bound of the wait at the end; less than Kubernetes' default grace (30 s),
            so that a preempted pod still finishes.

    Returns:
        None for mode none, where WANDB_MODE=disabled, or where W&B cannot be started.

    Raises:
        ConfigError: wandb is not installed, or a setting of its is not valid.
    """
    if mode == "none":
        return None
    if not project.strip():
        raise ConfigError("--run.project is empty; it must name a W&B project")
    begun: list[Tracker | None] = []
    failed: list[BaseException] = []
    calls = Background("wandb-calls")

    def begin() -> None:
        try:
            folders = WandbFolders(scratch_path)
            known = known_settings(mode)
            if known.mode == "disabled":
                begun.append(None)
                return
            start = _Start(
                project, run_id, _shown_name(name), {**config, "environment": environment or {}},
                folders.root_path, init_timeout_s, finish_timeout_s,
            )  # fmt: skip
            start.root_path.mkdir(parents=True, exist_ok=True)
            run, why_offline = _begin(start, known, may_be_online=mode == "auto")
            tracker = Tracker(run, calls, folders, mirror_url, note, finish_timeout_s)
            how = f"offline ({why_offline}); to upload: wandb sync " if tracker.offline else ""
            note(f"W&B {how}{tracker.place}" if how else f"W&B: {tracker.place}")
            begun.append(tracker)
        except BaseException as error:
            failed.append(error)

    calls.submit(begin)
    if not calls.wait(2 * init_timeout_s + _START_S):
        failed.append(TimeoutError("it does not answer"))
    if not failed and begun[0] is not None:
        return begun[0]
    calls.close()
    if not failed:
        return None
    end_service(find_service())
    if isinstance(failed[0], ConfigError):
        raise failed[0]
    note(f"W&B cannot be started ({in_one_line(failed[0])}): the run goes on without tracking")
    return None


class _Start(NamedTuple):
    """What a W&B run is started with."""

    project: str
    run_id: str
    name: str
    config: dict[str, Any]
    root_path: Path
    init_timeout_s: float
    finish_timeout_s: float

    def init(self, mode: Literal["online", "offline"]) -> "wandb.Run":
        """Start it. Raises ConfigError if W&B does not take the project or the id."""
        import wandb

        with as_config_errors({"project": "--run.project", "run id": "WANDB_RUN_ID"}):
            settings = wandb.Settings(
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
        return wandb.init(
            project=self.project,
            id=self.run_id,
            name=self.name,
            dir=self.root_path,
            resume="allow",
            config=self.config,
            allow_val_change=True,
            settings=settings,
        )


def _begin(start: _Start, known: "wandb.Settings", may_be_online: bool) -> tuple["wandb.Run", str]:
    """The run, and why it is offline if it is."""
    import wandb

    why_offline, run = "as asked", None
    if may_be_online and known.mode not in ("offline", "dryrun"):
        _, why_offline = find_key(known.base_url, known.api_key or known.identity_token_file)
        if not why_offline:
            try:
                run = start.init("online")
            except ConfigError:
                raise
            except Exception as error:
                why_offline = f"{known.base_url}: {in_one_line(error)}"
                wandb.teardown()  # or the id counts as in use
    run = run or start.init("offline")
    run.define_metric(STEP_KEY)
    run.define_metric("*", step_metric=STEP_KEY, step_sync=True)
    return run, why_offline


def _shown_name(name: str) -> str:
    """A run's name as W&B takes it."""
    return name.encode(errors="replace").decode()[:_NAME_LETTERS]
