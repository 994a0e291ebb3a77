"""What a prediction has done so far: parts of its table, each written whole, under TABLE.parts/.

A part is a JSON-lines file, a line an image: [path, [[class, probability], ...]], or [path, why it
could not be read]. Its name has the number of the part and a hash of the plan: the images, the
model and the division that the parts of one table share. So a part of anything else is never taken
for one of these, not even one that a forgotten process still writes.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightship import storage, versions
from lightship.errors import DataError, LightshipError, TakenOver
from lightship.predict.table import Prediction

logger = logging.getLogger(__name__)
PART_IMAGES = 1024
_PLAN = "parts.json"
_FORMAT = "prediction parts"
_AT_ONCE = 16
BEST = 5
_MAX_ROW_BYTES, _MAX_PLAN_BYTES = 2**15, 2**20
"""On average in a part; more was not written by lightship."""


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be read.

    Attributes:
        path: Of the image, relative to the data's root.
        reason: Why, and its name.
    """

    path: str
    reason: str


Row = Prediction | Unreadable


@dataclass(frozen=True)
class Division:
    """Which images are in which part, for any number of processes.

    Attributes:
        num_images: Of the whole table.
        batch_size: Images that the net sees together, in every batch the same ones.
    """

    num_images: int
    batch_size: int

    @property
    def batches_per_part(self) -> int:
        """Batches that make a part, of 1,024 images or (one batch) more."""
        return max(1, PART_IMAGES // self.batch_size)

    @property
    def part_size(self) -> int:
        """Images in a part; the last may have fewer."""
        return self.batch_size * self.batches_per_part

    @property
    def num_parts(self) -> int:
        """How many parts there are."""
        return -(-self.num_images // self.part_size)

    def ids(self, number: int) -> range:
        """The images of a part."""
        first = number * self.part_size
        return range(first, min(first + self.part_size, self.num_images))

    def rounds(self, todo: Sequence[int], world_size: int) -> list[list[int | None]]:
        """The part of each rank in each round; None: the rank has none.

        A rank's parts are consecutive, and so are the files that it reads.
        """
        count = -(-len(todo) // world_size)
        padded = [*todo, *[None] * (count * world_size - len(todo))]
        return [padded[number::count] for number in range(count)]


class Parts:
    """The parts of one table. Methods block; which ranks call them they say.

    Args:
        table_url: Of the table to be.
        plan: What makes a part what it is, as plain values by the names that the user knows.
        division: Which images lie in which part; belongs to the plan too.
        name_of: The path of an image by its id.
        class_names: Of the model.
    """

    def __init__(
        self,
        table_url: str,
        plan: Mapping[str, Any],
        division: Division,
        name_of: Callable[[int], str],
        class_names: Collection[str],
    ) -> None:
        self.url, self.division = f"{table_url}.parts", division
        sizes = {"batch size": division.batch_size, "part size": division.part_size}
        self.plan = {**plan, **sizes}
        self._name_of, self._class_names = name_of, {name: name for name in class_names}
        text = json.dumps(self.plan, sort_keys=True)
        self._key = hashlib.sha256(text.encode()).hexdigest()[:12]
        storage.refuse_link(self.url)

    def open(self) -> dict[int, list[int]]:
        """The parts that are there and whole; all others are removed. Rank 0.

        Returns:
            Number of a part -> ids of its images that could not be read.

        Raises:
            NewerVersion: A newer version of lightship wrote them; nothing is removed.
            TakenOver: Another process removes them.
        """
        sizes = self._own_files()
        numbers = [int(name.partition("-")[0]) for name in sizes if name != _PLAN]
        done = {number for number in numbers if self._name(number) in sizes}
        before = self._kept_plan() if _PLAN in sizes else {}
        version = before.pop("version", None)
        versions.check(_FORMAT, version, storage.redact(self._at(_PLAN)))
        if before != self.plan:
            others = sizes.keys() - {_PLAN, *map(self._name, done)}
            if others:
                changed = [key for key, value in self.plan.items() if before.get(key) != value]
                logger.info(
                    f"{len(others)} parts in {storage.redact(self.url)} are of another table "
                    f"({', '.join(changed)} differ): starting over"
                )
                self._remove(sorted(others))
            plan = {**self.plan, "version": versions.VERSIONS[_FORMAT]}
            storage.write_bytes(self._at(_PLAN), json.dumps(plan, indent=1).encode())
        return self._whole({n: sizes[self._name(n)] for n in done if n < self.division.num_parts})

    def _own_files(self) -> dict[str, int]:
        """Name -> bytes of the files that are exactly named as parts; others are the user's."""
        try:
            listed = storage.list_files(self.url, skip=lambda folder: True)
        except storage.NotFound:
            return {}
        is_own = re.compile(rf"[0-9]{{6,9}}-[0-9a-f]{{12}}\.jsonl|{re.escape(_PLAN)}").fullmatch
        return {file.path: file.size_bytes for file in listed if is_own(file.path)}

    def _whole(self, sizes: Mapping[int, int]) -> dict[int, list[int]]:
        """`open`'s, of the parts of these sizes; what cannot be read is removed with a line."""
        numbers = [
            number
            for number, size_bytes in sorted(sizes.items())
            if size_bytes <= _MAX_ROW_BYTES * len(self.division.ids(number))
        ]
        whole = {
            number: [i for i, row in zip(ids, rows, strict=True) if isinstance(row, Unreadable)]
            for number, rows in self._read_parts(numbers)
            for ids in [self.division.ids(number)]
            if rows is not None
        }
        if damaged := sorted(sizes.keys() - whole):
            names, url = [self._name(number) for number in damaged], storage.redact(self.url)
            logger.warning(
                f"{len(names)} parts in {url} are damaged and predicted again: "
                f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            )
            self._remove(names)
        return whole

    def path(self, i: int) -> str:
        """What image `i` is called in a row."""
        # Bytes in a file's name that are no UTF-8 are in no table either.
        return self._name_of(i).encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def write(self, number: int, rows: Sequence[Row]) -> None:
        """Write a part whole. Any rank, each its own."""
        lines = [
            json.dumps([row.path, row.top5 if isinstance(row, Prediction) else row.reason])
            for row in rows
        ]
        storage.write_bytes(self._at(self._name(number)), "".join(f"{x}\n" for x in lines).encode())

    def read(self) -> Iterator[list[Row]]:
        """All parts in order; memory holds a few. Rank 0, when all are there.

        Raises:
            DataError: One has been changed since it was written; it is removed.
            TakenOver: Another process has removed them.
        """
        for number, rows in self._read_parts(range(self.division.num_parts)):
            if rows is None:
                self._remove([self._name(number)])
                raise DataError(
                    f"{storage.redact(self._at(self._name(number)))} was damaged after it was "
                    "written: rerun the command to predict it again"
                )
            yield rows

    def _read_parts(self, numbers: Sequence[int]) -> Iterator[tuple[int, list[Row] | None]]:
        """Each part with its rows, or None where it is damaged; memory holds a few."""
        for first in range(0, len(numbers), _AT_ONCE):
            group = numbers[first : first + _AT_ONCE]
            for number, data in zip(group, self._contents(group), strict=True):
                assert isinstance(data, bytes)
                yield number, self._rows(number, data)

    def _contents(self, numbers: Sequence[int]) -> list[bytes | Exception]:
        """The bytes of each of these parts."""
        try:
            return storage.read_spans(
                [storage.Span(self._at(self._name(number))) for number in numbers]
            )
        except storage.NotFound as error:
            raise TakenOver(
                f"another process has removed parts from {storage.redact(self.url)}: it has "
                "written the table, or has begun it again. If the table is there, nothing is "
                "left to do"
            ) from error

    def _rows(self, number: int, data: bytes) -> list[Row] | None:
        """The rows of a part; None where it is not as `write` writes it."""
        ids, lines = self.division.ids(number), data.splitlines()
        if len(lines) != len(ids):
            return None
        try:
            return [self._row(i, line) for i, line in zip(ids, lines, strict=True)]
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None

    def _row(self, i: int, line: bytes) -> Row:
        """The row of image `i`. Raises ValueError, TypeError and others for what is none."""
        path, found = json.loads(line)
        if path != self.path(i):
            raise ValueError(f"it is of {path!r:.80}")
        if isinstance(found, str):
            return Unreadable(path, found)
        # The model's own texts: rows share them.
        top5 = [(self._class_names[name], float(share)) for name, share in found]
        if len(top5) > BEST or len({name for name, _ in top5}) < len(top5):
            raise ValueError("too many classes, or one twice")
        if not all(0 <= share <= 1 for _, share in top5):
            raise ValueError("a probability that is none")
        return Prediction(path, top5)

    def remove(self) -> None:
        """Remove the parts, when the table is there, and their folder if it is empty. Rank 0."""
        self._remove(sorted(self._own_files()))
        storage.remove_temporaries(self.url)
        storage.remove_folder(self.url)

    def _kept_plan(self) -> dict[str, Any]:
        try:
            kept = json.loads(storage.read_small(self._at(_PLAN), _MAX_PLAN_BYTES))
        except storage.NotFound:  # another process has finished meanwhile
            return {}
        except (ValueError, RecursionError) as error:
            if isinstance(error, LightshipError):
                raise
            return {}
        return kept if isinstance(kept, dict) else {}

    def _remove(self, names: Sequence[str]) -> None:
        storage.parallel_map(storage.remove, map(self._at, names), _AT_ONCE)

    def _name(self, number: int) -> str:
        return f"{number:06d}-{self._key}.jsonl"

    def _at(self, name: str) -> str:
        return storage.join(self.url, name)
