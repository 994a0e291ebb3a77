"""Files that lightship itself writes under a data root: runs, packs, tables of predictions."""

import contextlib
import csv
import json
import re
from collections.abc import Collection, Container, Iterator
from itertools import islice

from lightship import storage
from lightship.data.shards.index import INDEX, INDEX_0_1, PLAN, SKIPPED
from lightship.data.sources.parquet_file import open_parquet
from lightship.errors import LightshipError
from lightship.storage.file_table import FileTable

_MARK = re.compile(
    r"(?:(.+)/)?(?:checkpoints/attempt|logs/starts\.json|DONE)|(.+\.parts)/parts\.json"
)
_MARK_ENDS = ("/attempt", "/starts.json", "DONE", "/parts.json")
_RUN_PARTS = (
    "checkpoints/", "logs/", "report/", "export/", "data/manifest-", "config.yaml", "DONE",
    "predictions.",
)  # fmt: skip
"""What the paths of a run's files begin with, below its folder."""
PREDICTION_COLUMNS = ("path", "class", "probability", "top5")
_HEAD_BYTES, _MAX_TABLES = 4096, 8


def run_folders(paths: Collection[str]) -> set[str]:
    """Folders that a run or an unfinished prediction has written; "" is the root itself."""
    marks = (_MARK.fullmatch(path) for path in paths if path.endswith(_MARK_ENDS))
    folders = {(found[1] or found[2] or "", found[0]) for found in marks if found}
    return {
        folder
        for folder, path in folders
        if not path.endswith("DONE") or f"{path.removesuffix('DONE')}config.yaml" in paths
    }


def is_of_run(path: str, runs: set[str]) -> bool:
    """Whether a run has written a file; `runs` are all `run_folders`."""
    if not runs:
        return False
    is_below = not runs.isdisjoint(_folders_of(path))
    return is_below or ("" in runs and path.startswith(_RUN_PARTS))


def folders_without_images(runs: set[str]) -> set[str]:
    """The folders of runs, and those that may hold nothing else."""
    above = {folder for run in runs for folder in _folders_of(run)}
    return runs | above | ({part.partition("/")[0] for part in _RUN_PARTS} if "" in runs else set())


def _folders_of(path: str) -> Iterator[str]:
    at = path.find("/")
    while at >= 0:
        yield path[:at]
        at = path.find("/", at + 1)


def without_own(unread: FileTable, files: Container[str], url: str) -> FileTable:
    """Those of the unread files that lightship did not write. Rank 0; blocks.

    Args:
        unread: The files that no reader takes.
        files: Paths of all files under the root.
        url: The root.
    """
    others = unread.select(unread.mask(lambda path: not _is_of_pack(path, files)))
    tables = (path for path in others if path.lower().endswith((".csv", ".jsonl", ".parquet")))
    predictions = {path for path in islice(tables, _MAX_TABLES) if _is_prediction(url, path)}
    return others.select(others.mask(lambda path: path not in predictions))


def _is_of_pack(path: str, files: Container[str]) -> bool:
    folder, slash, name = path.rpartition("/")
    is_beside_classes = name in (PLAN, SKIPPED) and f"{folder}{slash}classes.txt" in files
    return name in (INDEX, INDEX_0_1) or is_beside_classes


def _is_prediction(url: str, path: str) -> bool:
    """Whether a file has the columns of `lightship predict`."""
    file_url = storage.join(url, path)
    with contextlib.suppress(LightshipError, ValueError, RecursionError, csv.Error):
        if path.lower().endswith(".parquet"):
            with open_parquet(file_url, path) as table:
                return tuple(table.file.schema_arrow.names) == PREDICTION_COLUMNS
        with storage.open_binary(file_url) as file:
            line = file.readline(_HEAD_BYTES).decode()
        columns = json.loads(line) if path.lower().endswith(".jsonl") else next(csv.reader([line]))
        return isinstance(columns, list | dict) and tuple(columns) == PREDICTION_COLUMNS
    return False
