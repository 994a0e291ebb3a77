"""A run's table of metrics, logs/metrics.csv."""

import csv
import io
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightship import storage
from lightship.safe_text import csv_cell

_FIXED_COLUMNS = ("step", "epoch", "time_s")


class MetricsCSV(Logger):
    """`OUTPUT/logs/metrics.csv`: one row per logged step, one column per metric, blank if absent.

    Held in memory and written whole, since object stores cannot append. Every rank may construct
    it and log to it; only rank 0 reads and writes. Values are Python floats: no device sync.
    """

    def __init__(
        self,
        output_url: str,
        check_fence: Callable[[], None] = lambda: None,
        write_every_s: float = 30.0,
    ) -> None:
        """An empty table of the run at `output_url`.

        Args:
            output_url: Of the run.
            check_fence: Called before each write; raises if a later start has taken the run over.
            write_every_s: Min seconds between two writes; `finalize` writes the rest.
        """
        super().__init__()
        self.url = storage.join(output_url, "logs", "metrics.csv")
        self.rows: list[dict[str, float]] = []
        self.latest: dict[str, float] = {}
        self._check_fence = check_fence
        self._write_every_s = write_every_s
        self._columns: dict[str, None] = dict.fromkeys(_FIXED_COLUMNS)
        self._unwritten = False
        self._started_s = self._written_s = time.monotonic()

    @property
    def name(self) -> str:
        """Name of the logger's folder, for Lightning."""
        return "logs"

    @property
    def version(self) -> str:
        """Name of the logger's subfolder, for Lightning: none."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's settings are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add `metrics` to the row of `step`, and write the table if a write is due (blocks).

        Lightning counts a validation at the end of an epoch one step low, so a step smaller than
        the newest row's is taken as that row's.
        """
        newest = int(self.rows[-1]["step"]) if self.rows else 0
        step = newest if step is None else max(step, newest)
        if not self.rows or step > newest:
            self.rows.append({"step": step})
        row = self.rows[-1]
        row.update({key: float(value) for key, value in metrics.items()})
        row["time_s"] = time.monotonic() - self._started_s
        self.latest.update(row)
        self._columns.update(dict.fromkeys(metrics))
        self._unwritten = True
        if time.monotonic() - self._written_s >= self._write_every_s:
            self._write()

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Write the rows not yet written. Blocks."""
        if self._unwritten:
            self._write()

    @rank_zero_only
    def load_rows(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Continue from the rows in a checkpoint."""
        self.rows = [dict(row) for row in rows]
        for row in self.rows:
            self.latest.update(row)
            self._columns.update(dict.fromkeys(row))
        self._unwritten = True
        if rows:
            self._started_s = time.monotonic() - rows[-1]["time_s"]

    def validation(self, step: int) -> dict[str, float]:
        """The `val/...` metrics logged at `step`."""
        row = next((row for row in self.rows if row["step"] == step), {})
        return {name: value for name, value in row.items() if name.startswith("val/")}

    def _write(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self._columns), lineterminator="\n")
        writer.writerow({name: csv_cell(name) for name in self._columns})
        for row in self.rows:
            writer.writerow({key: _exact(value) for key, value in row.items()})
        self._check_fence()
        storage.write_bytes(self.url, text.getvalue().encode())
        self._unwritten = False
        self._written_s = time.monotonic()


def _exact(value: float) -> str:
    """`value` as text that parses to the same number; integers without a decimal point."""
    is_whole = float(value).is_integer() and abs(value) < 2**53
    return str(int(value)) if is_whole else repr(float(value))
