"""Weights & Biases: a run's numbers as they come (sole importer of wandb)."""

import os
import secrets
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from lightning.pytorch.loggers import Logger

from lightship import storage
from lightship.exits import ConfigError
from lightship.wandb_key import find_key

if TYPE_CHECKING:
    import wandb

STEP_KEY = "trainer/global_step"
"""The x-axis of every W&B chart (Lightning's own name for it): W&B's `_step` counts calls, and
starts again at 0 when an offline run is resumed."""
CONFUSION_CHART_CLASSES = 50
"""Up to so many classes the confusion matrix is a W&B chart; beyond, a table of its worst pairs."""
CONFUSION_PAIRS = 200
_CONFUSION_CHART = "wandb/confusion_matrix/v1"


def _print_note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_id(stored: str | None = None) -> str:
    """The W&B id of a run: WANDB_RUN_ID, else the one in its checkpoint, else a new one.

    Args:
        stored: the id that the checkpoint resumed from carries.

    Returns:
        The id; a new one is 8 random characters of 0-9a-z.
    """
    letters = string.ascii_lowercase + string.digits
    new_id = "".join(secrets.choice(letters) for _ in range(8))
    return os.environ.get("WANDB_RUN_ID") or stored or new_id


class Tracker(Logger):
    """A started W&B run as a Lightning logger. Rank 0 only; `start_tracking` makes it."""

    def __init__(self, run: "wandb.Run", note: Callable[[str], None] = _print_note) -> None:
        super().__init__()
        self.run = run
        self._note = note
        self._step = 0

    @property
    def name(self) -> str:
        """The W&B project."""
        return self.run.project

    @property
    def version(self) -> str:
        """The W&B run id, which the checkpoints carry."""
        return self.run.id

    @property
    def offline(self) -> bool:
        """Whether the run is kept on disk only."""
        return self.run.offline

    @property
    def run_path(self) -> Path:
        """The folder that `wandb sync` takes."""
        return Path(self.run.settings.sync_dir)

    @property
    def place(self) -> str:
        """Where a person finds the run: its page, or the folder that `wandb sync` takes."""
        return str(self.run_path) if self.offline else str(self.run.url)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: `start_tracking` has logged the run's whole resolved config."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Hand `metrics` to W&B's own process; does not wait for it.

        A step never goes back (see `MetricsTable.log_metrics`).
        """
        self._step = max(step or 0, self._step)
        self.run.log({**metrics, STEP_KEY: self._step})

    def log_images(
        self, key: str, images: Sequence[np.ndarray], captions: Sequence[str], step: int
    ) -> None:
        """Log pictures.

        Args:
            key: the panel's name.
            images: each [H, W, 3] uint8.
            captions: one an image.
            step: optimizer step.
        """
        import wandb

        pairs = zip(images, captions, strict=True)
        panel = [wandb.Image(image, caption=caption) for image, caption in pairs]
        self.log_metrics({key: panel}, step)

    def log_confusion(
        self, confusion: np.ndarray, class_names: Sequence[str], key: str = "test/confusion"
    ) -> None:
        """Log a confusion matrix: as a chart, or as the table of its most confused pairs.

        Args:
            confusion: [C, C] counts, rows the true class, columns the predicted one.
            class_names: C names.
            key: the panel's name.
        """
        import wandb

        columns: list[str | int] = ["Actual", "Predicted", "nPredictions"]
        counts = [(int(count), *place) for place, count in np.ndenumerate(confusion)]
        is_chart = len(class_names) <= CONFUSION_CHART_CLASSES
        if not is_chart:
            mistakes = [cell for cell in counts if cell[0] and cell[1] != cell[2]]
            counts = sorted(mistakes, reverse=True)[:CONFUSION_PAIRS]
        cells = [[class_names[true], class_names[guess], count] for count, true, guess in counts]
        table = wandb.Table(columns=columns, data=cells)
        if is_chart:
            fields = {str(column): str(column) for column in columns}
            self.log_metrics({key: wandb.plot_table(_CONFUSION_CHART, table, fields)}, self._step)
        else:
            self.log_metrics({f"{key}_pairs": table}, self._step)

    def finish(self, exit_code: int) -> None:
        """End the W&B run; blocks until all is handed over, at most the finish time-out.

        Args:
            exit_code: of this process; 143 marks the run preempted rather than failed.
        """
        import wandb

        if exit_code == 143:
            self.run.mark_preempting()
        try:
            self.run.finish(exit_code=exit_code)
        except TimeoutError:
            self._note(f"W&B did not take all in time; what is left: wandb sync {self.run_path}")
        wandb.teardown(exit_code=exit_code)


def start_tracking(
    mode: Literal["auto", "offline", "none"],
    project: str,
    run_id: str,
    name: str,
    config: dict[str, Any],
    scratch_path: Path,
    environment: dict[str, Any] | None = None,
    note: Callable[[str], None] = _print_note,
    init_timeout_s: float = 30.0,
    finish_timeout_s: float = 20.0,
) -> Tracker | None:
    """Start, or go on with, the W&B run `run_id`. Rank 0 alone calls it, before training.

    Blocks at most about `init_timeout_s`, and never asks: with a key (WANDB_API_KEY, or the netrc
    entry of WANDB_BASE_URL's host) the run is online, without one or when the server does not
    answer it is offline. `note` is given one line that says which, and how to sync.

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
        init_timeout_s: bound of the wait for the server at the start.
        finish_timeout_s: bound of the wait at the end; less than Kubernetes' default grace (30 s),
            so that a preempted pod still finishes.

    Returns:
        None for mode none, or where WANDB_MODE=disabled.

    Raises:
        ConfigError: wandb is not installed, or its own settings are not valid.
    """
    if mode == "none":
        return None
    known = known_settings(mode)
    if known.mode == "disabled":
        return None
    import wandb

    environment = environment or {}
    scratch_path.mkdir(parents=True, exist_ok=True)

    def init(wandb_mode: Literal["online", "offline"]) -> "wandb.Run":
        settings = wandb.Settings(
            mode=wandb_mode,
            silent=True,
            # No capture of stdout: it would sit between the progress bar and its terminal.
            console="off",
            # Our bounded look at git, in place of wandb's unbounded one.
            disable_git=True,
            disable_code=True,
            init_timeout=init_timeout_s,
            finish_timeout=finish_timeout_s,
            finish_timeout_raises=True,
            # System metrics stay on: they are sampled every 15 s in wandb's own process, and the
            # GPU's are what one opens W&B for.
            x_disable_stats=False,
        )
        return wandb.init(
            project=project,
            id=run_id,
            name=name,
            dir=scratch_path,
            resume="allow",
            config={**config, "environment": environment},
            allow_val_change=True,
            settings=settings,
        )

    why_offline = "as asked"
    run = None
    if mode == "auto" and known.mode not in ("offline", "dryrun"):
        _, why_offline = find_key(known.base_url, known.api_key or known.identity_token_file)
        if not why_offline:
            try:
                run = init("online")
            except (wandb.Error, TimeoutError) as error:
                why_offline = f"{known.base_url}: {str(error).splitlines()[0]}"
                wandb.teardown()  # or the id counts as in use
    run = run or init("offline")
    run.define_metric(STEP_KEY)
    run.define_metric("*", step_metric=STEP_KEY, step_sync=True)
    tracker = Tracker(run, note)
    if tracker.offline:
        note(f"W&B offline ({why_offline}); to upload: wandb sync {tracker.place}")
    else:
        note(f"W&B: {tracker.place}")
    return tracker


def known_settings(mode: str) -> "wandb.Settings":
    """W&B's own settings, of environment and files. Blocks for the import; asks no server.

    Raises:
        ConfigError: wandb is not installed, or its settings are not valid.
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

    try:
        return wandb.setup(settings=wandb.Settings(silent=True)).settings
    except (ValueError, wandb.Error) as error:
        told = " ".join(str(error).split())
        raise ConfigError(
            f"a WANDB_* variable or wandb's settings file is wrong: {told}"
        ) from error


def read_settings(mode: str) -> "wandb.Settings":
    """`known_settings` for one who starts no run: wandb's threads and service are ended again."""
    known = known_settings(mode)
    import wandb

    wandb.teardown()
    return known


def upload_offline_run(scratch_path: Path, output_url: str) -> list[str]:
    """Copy the offline W&B runs under `scratch_path` to OUTPUT/logs/wandb/.

    Rank 0 calls it after `Tracker.finish`, where the output is not on this machine; blocks.

    Returns:
        The folders written, as URLs; fetched back, each is what `wandb sync` takes.
    """
    urls = []
    for run_path in sorted((scratch_path / "wandb").glob("offline-run-*")):
        url = storage.join(output_url, "logs", "wandb", run_path.name)
        for path in sorted(run_path.rglob("*")):
            if path.is_file() and not path.is_symlink():
                storage.write_file(storage.join(url, *path.relative_to(run_path).parts), path)
        urls.append(url)
    return urls
