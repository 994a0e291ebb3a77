"""A W&B run as a Lightning logger."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from lightning.pytorch.loggers import Logger

from lightship.errors import in_one_line
from lightship.safe_text import shown
from lightship.tracking.background import Background
from lightship.tracking.folders import WandbFolders, is_writable
from lightship.tracking.mirror import Mirror
from lightship.tracking.service import end_service, find_service

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)
STEP_KEY = "trainer/global_step"
"""The x-axis of every W&B chart (Lightning's name for it): W&B's `_step` counts calls, and restarts
at 0 when an offline run is resumed."""
CONFUSION_CHART_CLASSES = 50
"""Max classes for a confusion matrix chart; with more, a table of the most confused pairs."""
CONFUSION_PAIRS = 200
_CONFUSION_CHART = "wandb/confusion_matrix/v1"
_FINISH_MARGIN_S = 3.0
_STALLED_S = 120.0
"""Max duration of a call before tracking stops."""
_COPY_S, _COPY_PREEMPTED_S = 150.0, 10.0


class Timeouts(NamedTuple):
    """Max seconds that a W&B run's start and its end take."""

    start_s: float
    finish_s: float


class Tracker(Logger):
    """A W&B run as a Lightning logger. Rank 0 only; created by `start_tracking`.

    W&B never fails or blocks training: the run is started and its calls are made in the background,
    and the first that fails or does not return stops tracking with a warning.

    Args:
        init: Starts W&B's run; returns it, and why it is offline.
        project: W&B's project.
        run_id: W&B's id of the run.
        calls: The thread that calls W&B.
        folders: W&B's folders; temporary ones are removed at the end.
        mirror_url: Where an offline run is copied to; None: nowhere.
        timeouts: Max wait at the end, for a start that is not over yet and for the upload.

    Attributes:
        offline: Whether the run is only on disk.
        run_path: The folder that `wandb sync` takes; None: the run is not started yet.
        place: Where to find the run: its page, or what `wandb sync` takes; empty: not started yet.
    """

    def __init__(
        self,
        init: Callable[[], "tuple[wandb.Run, str]"],
        project: str,
        run_id: str,
        calls: Background,
        folders: WandbFolders,
        mirror_url: str | None,
        timeouts: Timeouts,
    ) -> None:
        super().__init__()
        self.offline = False
        self.run_path: Path | None = None
        self.place = ""
        self._project, self._id = project, run_id
        self._service = find_service()
        self._calls, self._folders = calls, folders
        self._mirror_url = mirror_url
        self._mirror: Mirror | None = None
        self._start_by_s = time.monotonic() + timeouts.start_s
        self._finish_timeout_s = timeouts.finish_s
        self._step = 0
        self._is_over = self._is_finished = False
        self._run = calls.begin(partial(self._begin, init))

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Finish, with the exit code in which `error` ends."""
        self.finish(0 if error is None else getattr(error, "exit_code", 1))

    @property
    def name(self) -> str:
        """The W&B project."""
        return self._project

    @property
    def version(self) -> str:
        """The W&B run id, which the checkpoints carry."""
        return self._id

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: `start_tracking` has logged the resolved config."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Hand `metrics` to W&B's process. Does not block.

        A step never goes back (see `MetricsCSV.log_metrics`).
        """
        self._step = max(step or 0, self._step)
        self._submit("log", partial(self._log, {**metrics, STEP_KEY: self._step}))

    def log_images(
        self, key: str, images: Sequence[np.ndarray], captions: Sequence[str], step: int
    ) -> None:
        """Log images. Does not block.

        Args:
            key: Of the panel.
            images: Each [H, W, 3] uint8.
            captions: One per image.
            step: Optimizer step.
        """
        self._step = max(step, self._step)
        at, pairs = self._step, list(zip(images, captions, strict=True))

        def log() -> None:
            import wandb

            panel = [wandb.Image(image, caption=shown(caption)) for image, caption in pairs]
            self._log({key: panel, STEP_KEY: at})

        self._submit("log images", log)

    def log_confusion(
        self, confusion: np.ndarray, class_names: Sequence[str], key: str = "test/confusion"
    ) -> None:
        """Log a confusion matrix as a chart or, if it is large, its most confused pairs as a table.

        Args:
            confusion: [C, C] counts, rows the true class, columns the predicted one.
            class_names: C names.
            key: Of the panel.
        """
        columns: list[str | int] = ["Actual", "Predicted", "nPredictions"]
        counts = [(int(count), *place) for place, count in np.ndenumerate(confusion)]
        is_chart = len(class_names) <= CONFUSION_CHART_CLASSES
        if not is_chart:
            mistakes = [cell for cell in counts if cell[0] and cell[1] != cell[2]]
            counts = sorted(mistakes, reverse=True)[:CONFUSION_PAIRS]
        names = [shown(name) for name in class_names]
        cells = [[names[true], names[guess], count] for count, true, guess in counts]
        at = self._step

        def log() -> None:
            import wandb

            table: Any = wandb.Table(columns=columns, data=cells)
            if is_chart:
                fields = {str(column): str(column) for column in columns}
                chart = wandb.plot_table(_CONFUSION_CHART, table, fields)
                self._log({key: chart, STEP_KEY: at})
            else:
                self._log({f"{key}_pairs": table, STEP_KEY: at})

        self._submit("log a table", log)

    def finalize(self, status: str) -> None:
        """Copy an offline run, at the end of training. Does not block."""
        if self._mirror:
            self._copies.submit(self._mirror.copy)

    def finish(self, exit_code: int) -> None:
        """End the W&B run, once. Blocks for the upload, within the timeouts.

        Args:
            exit_code: Of this process; 0 waits for a run that is still being started, others do
                not. 143 marks the run as preempted rather than failed.
        """
        if self._is_finished:
            return
        self._is_finished = True
        if exit_code == 0:
            self.wait_for_start()
        self._submit("finish", partial(self._finish, exit_code))
        upload_s = self._finish_timeout_s if self._run.done() else 0.0
        if not self._is_over and not self._calls.wait(upload_s + _FINISH_MARGIN_S):
            self._fail("finish", TimeoutError("it does not answer"))
        if self._is_over:
            end_service(self._service)
        elif self.run_path and self.offline and not is_writable(self.run_path):  # W&B is silent
            logger.warning(
                f"the W&B offline run may be incomplete: {self.run_path} cannot be written"
            )
        self._is_over = True
        if self._mirror:
            self._copies.submit(self._mirror.copy)
            bound_s = _COPY_PREEMPTED_S if exit_code == 143 else _COPY_S
            in_time = self._copies.wait(bound_s)
            why = self._mirror.error if in_time else f"not copied within {bound_s:g} s"
            if why:
                logger.warning(f"the W&B offline run is incomplete at {self.place}: {why}")
            self._copies.close()
        self._calls.close()
        self._folders.remove()

    def wait_for_start(self) -> None:
        """Wait until the run is started or could not be. Blocks, within its timeout."""
        futures.wait([self._run], max(0.0, self._start_by_s - time.monotonic()))

    def _begin(self, init: Callable[[], "tuple[wandb.Run, str]"]) -> "wandb.Run":
        try:
            run, why_offline = init()
            run.define_metric(STEP_KEY)
            run.define_metric("*", step_metric=STEP_KEY, step_sync=True)
        except BaseException as error:
            self._fail("start", error)
            raise
        self.offline, self.run_path = run.offline, Path(run.settings.sync_dir)
        self.place = str(self.run_path) if self.offline else str(run.url)
        if self.offline and self._mirror_url:
            self._copies = Background("wandb-copies")  # those of W&B must not wait for storage
            self._mirror = Mirror(self.run_path, self._mirror_url)
            self.place = self._mirror.url
        how = f" offline ({why_offline}); to upload: wandb sync" if self.offline else ":"
        logger.info(f"W&B{how} {self.place}")
        return run

    def _log(self, row: dict[str, Any]) -> None:
        self._run.result().log(row)
        if self._mirror and not self._copies.busy_s():
            self._copies.submit(self._mirror.copy_if_due)

    def _finish(self, exit_code: int) -> None:
        import wandb

        run = self._run.result()
        if exit_code == 143:
            run.mark_preempting()
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:
            logger.warning(
                f"W&B did not finish uploading in time; to upload the rest: wandb sync "
                f"{self.run_path}"
            )
        wandb.teardown(exit_code=exit_code)

    def _submit(self, what: str, call: Callable[[], None]) -> None:
        """Call W&B in the background, unless tracking has stopped."""

        def guarded() -> None:
            if not self._is_over:
                try:
                    call()
                except BaseException as error:
                    self._fail(what, error)

        if self._calls.busy_s() > _STALLED_S:
            self._fail(what, TimeoutError(f"no answer within {_STALLED_S:g} s"))
        if not self._is_over:
            self._calls.submit(guarded)

    def _fail(self, what: str, error: BaseException) -> None:
        if not self._is_over:
            self._is_over = True
            then = "" if self._is_finished else ": tracking stops, training continues"
            so_far = f"; logged so far: {self.place}" if self.place else ""
            logger.warning(f"W&B failed to {what} ({in_one_line(error)}){then}{so_far}")
