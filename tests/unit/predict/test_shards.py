"""Parts of a table: how images are divided, and which parts are taken for this table's."""

import json
import uuid
from itertools import chain
from pathlib import Path

import pytest

from lightship import storage
from lightship.errors import ConfigError, DataError, TakenOver
from lightship.predict.shards import Division, Parts, Unreadable
from lightship.predict.table import Prediction

PLAN = {"images": "i1", "model": "m1", "precision": "32-true"}


@pytest.mark.parametrize("num_images", [1, 5, 1024, 1025, 10_000])
@pytest.mark.parametrize("batch_size", [1, 7, 512, 1000, 4096])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_image_once(num_images: int, batch_size: int, world_size: int) -> None:
    division = Division(num_images, batch_size)
    ids = [i for number in range(division.num_parts) for i in division.ids(number)]
    assert ids == list(range(num_images))
    assert division.part_size % batch_size == 0

    todo = [number for number in range(division.num_parts) if number % 3 != 1]
    rounds = division.rounds(todo, world_size)
    assert all(len(each) == world_size for each in rounds)
    assert sorted(n for n in chain(*rounds) if n is not None) == todo
    assert len(rounds) == -(-len(todo) // world_size), "no rank works while the others are done"
    for mine in zip(*rounds, strict=True):
        assert [n for n in mine if n is not None] == sorted(n for n in mine if n is not None)


@pytest.fixture(autouse=True)
def lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lightship")


def rows_of(division: Division, number: int) -> list[Prediction | Unreadable]:
    return [
        Unreadable(f"{i}.png", f"{i}.png is empty")
        if i % 100 == 7
        else Prediction(f"{i}.png", [("cat", 0.75), ("dog", 0.25)])
        for i in division.ids(number)
    ]


def parts_at(url: str, division: Division, **plan: str) -> Parts:
    return Parts(url, {**PLAN, **plan}, division, lambda i: f"{i}.png", ["cat", "dog"])


class Place:
    """A table's place."""

    def __init__(self) -> None:
        self.url = f"memory://{uuid.uuid4().hex}/table.csv"

    def parts(self, num_images: int = 2500, batch_size: int = 512, **plan: str) -> Parts:
        return parts_at(self.url, Division(num_images, batch_size), **plan)

    def files(self) -> list[str]:
        try:
            return [file.path for file in storage.list_files(f"{self.url}.parts")]
        except storage.NotFound:
            return []


def test_what_is_written_is_found_and_read(caplog: pytest.LogCaptureFixture) -> None:
    place = Place()
    parts = place.parts()
    assert parts.open() == {}
    for number in (2, 0):
        parts.write(number, rows_of(parts.division, number))
    assert place.parts().open() == {0: list(range(7, 1024, 100)), 2: list(range(2107, 2500, 100))}
    parts.write(1, rows_of(parts.division, 1))
    assert place.parts().open().keys() == {0, 1, 2}
    assert list(place.parts().read()) == [rows_of(parts.division, number) for number in range(3)]
    parts.remove()
    assert place.files() == []
    assert not caplog.messages


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"images": "i2"}, "images"),
        ({"model": "m2"}, "model"),
        ({"precision": "bf16-mixed"}, "precision"),
        ({"batch_size": 100}, "batch size, part size"),
    ],
)
def test_another_plan_starts_anew_and_says_so(
    changed: dict, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place()
    parts = place.parts()
    parts.open()
    parts.write(0, rows_of(parts.division, 0))
    assert place.parts(**changed).open() == {}
    assert f"({named} differ): starting over" in caplog.text
    # A forgotten process of the first plan still writes: nobody takes its part.
    parts.write(1, rows_of(parts.division, 1))
    assert place.parts(**changed).open() == {}


@pytest.mark.parametrize("spoilt", [b"", b"{torn", b"[]", b"\xff\xfe"])
def test_a_torn_plan_loses_no_parts(spoilt: bytes) -> None:
    place = Place()
    parts = place.parts()
    parts.open()
    parts.write(0, rows_of(parts.division, 0))
    storage.write_bytes(f"{place.url}.parts/parts.json", spoilt)
    assert place.parts().open().keys() == {0}
    assert json.loads(storage.read_bytes(f"{place.url}.parts/parts.json"))["images"] == "i1"


def test_a_local_folder_of_parts_is_gone_with_them(tmp_path) -> None:
    parts = parts_at(str(tmp_path / "t.csv"), Division(3, 2))
    parts.open()
    parts.write(0, rows_of(parts.division, 0))
    parts.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data + b"\n",
        lambda data: b"\xff" * 40,
        lambda data: b"[" * 20_000,
        lambda data: data.replace(b"0.75", b'"x"', 1),
        lambda data: b"1,2\n" * 1024,
    ],
)
def test_a_damaged_part_is_made_again(damage, caplog: pytest.LogCaptureFixture) -> None:
    place = Place()
    parts = place.parts()
    parts.open()
    for number in range(3):
        parts.write(number, rows_of(parts.division, number))
    [name] = [name for name in place.files() if name.startswith("000001-")]
    url = f"{place.url}.parts/{name}"
    storage.write_bytes(url, damage(storage.read_bytes(url)))
    with pytest.raises(DataError, match=name):
        list(place.parts().read())
    storage.write_bytes(url, damage(json.dumps(["a", "b"]).encode()))
    assert place.parts().open().keys() == {0, 2}
    assert f"1 parts in {place.url}.parts are damaged and predicted again: {name}" in caplog.text
    assert place.parts().open().keys() == {0, 2}


def test_parts_of_another_version() -> None:
    place = Place()
    parts = place.parts()
    parts.open()
    parts.write(0, rows_of(parts.division, 0))
    url = f"{place.url}.parts/parts.json"
    plan = json.loads(storage.read_bytes(url))
    assert plan.pop("version") == 1
    storage.write_bytes(url, json.dumps(plan).encode())  # as 0.1.0 wrote it
    assert place.parts().open().keys() == {0}
    storage.write_bytes(url, json.dumps({**plan, "images": "i2", "version": 99}).encode())
    files = place.files()
    with pytest.raises(ConfigError, match=r"parts.json has version 99 .* upgrade lightship"):
        place.parts().open()
    assert place.files() == files


def test_only_files_that_are_named_as_parts_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "t.csv.parts"
    mine = {
        "notes.txt",
        "000000-mine.jsonl",
        "0-aaaaaaaaaaaa.jsonl",
        "old/000000-aaaaaaaaaaaa.jsonl",
    }
    for name in [*mine, "000000-aaaaaaaaaaaa.jsonl", f".{'a' * 32}.lightship-tmp"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    parts = parts_at(str(tmp_path / "t.csv"), Division(3, 3))
    assert parts.open() == {}
    parts.write(0, rows_of(parts.division, 0))
    parts.remove()
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert left == mine


def test_a_folder_of_parts_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "t.csv.parts").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match=r"t\.csv\.parts is a link"):
        parts_at(str(tmp_path / "t.csv"), Division(3, 3))


WRONG_ROWS = {
    "NaN": '["0.png", [["cat", NaN]]]',
    "infinite": '["0.png", [["cat", 1e999]]]',
    "999 digits": f'["0.png", [["cat", {"9" * 999}]]]',
    "negative": '["0.png", [["cat", -1]]]',
    "six classes": json.dumps(["0.png", [["cat", 0.1]] * 6]),
    "a class twice": json.dumps(["0.png", [["cat", 0.1]] * 2]),
    "a class that the model does not have": '["0.png", [["ant", 0.5]]]',
    "a class that is no text": '["0.png", [[["cat"], 0.5]]]',
    "a reason of 256 KiB": json.dumps(["0.png", "x" * 2**18]),
    "the path of another image": '["1.png", [["cat", 0.5]]]',
    "a path that no table can hold": '["a\\ud800.png", [["cat", 0.5]]]',
    "an unreadable image of another path": '["a\\ud800.png", "is empty"]',
    "a path that is a number": '[0, [["cat", 0.5]]]',
}


@pytest.mark.parametrize("case", ["right", *WRONG_ROWS])
def test_a_part_that_lightship_does_not_write_is_predicted_again(case: str) -> None:
    place = Place()
    parts = place.parts(num_images=3, batch_size=3)
    parts.open()
    row = WRONG_ROWS.get(case, '["0.png", [["cat", 0.5]]]')
    lines = [row, '["1.png", [["dog", 0.5]]]', '["2.png", "is empty"]', ""]
    storage.write_bytes(f"{place.url}.parts/{parts._name(0)}", "\n".join(lines).encode())
    whole = {0: [2]} if case == "right" else {}
    assert place.parts(num_images=3, batch_size=3).open() == whole


def test_names_that_are_no_utf8_are_whole_as_they_are_written(tmp_path: Path) -> None:
    name = b"\xff.png".decode("utf-8", "surrogateescape")
    parts = Parts(str(tmp_path / "t.csv"), PLAN, Division(1, 1), lambda i: name, ["cat"])
    parts.open()
    rows: list[Prediction | Unreadable] = [Prediction(parts.path(0), [("cat", 1.0)])]
    parts.write(0, rows)
    assert parts.open() == {0: []}
    assert list(parts.read()) == [rows]
    assert parts.path(0).encode().decode() == "\ufffd.png"


def test_who_finishes_later_ends_as_taken_over() -> None:
    place = Place()
    first, later = place.parts(), place.parts()
    for parts in (first, later):
        parts.open()
        for number in range(3):
            parts.write(number, rows_of(parts.division, number))
    assert len(list(first.read())) == 3
    first.remove()
    with pytest.raises(TakenOver, match="another process") as error:
        list(later.read())
    assert error.value.exit_code == 75


def test_parts_that_vanish_while_they_are_opened_are_anothers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = Place()
    first, later = place.parts(), place.parts()
    first.open()
    first.write(0, rows_of(first.division, 0))
    listed = later._own_files()
    monkeypatch.setattr(later, "_own_files", lambda: listed)
    first.remove()
    with pytest.raises(TakenOver, match="another process"):
        later.open()
