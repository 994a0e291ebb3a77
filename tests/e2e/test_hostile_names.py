"""Names of files and classes that would draw on a terminal, forge a line or be a formula."""

import csv
import json
import os
import re
import unicodedata
from pathlib import Path

import pytest

from lightship import cli
from tests.support.images import encoded, little_set, pixels_of

FORGED = "\x1b[2J\x9b1m\n[   0:00] done: forged\r\x07\u2028\u202e.png"
CLASSES = ["=cmd|' 'A0", "\u202etac\u2028\x85<img src=x onerror=alert(1)>", "@SUM(A1)"]
BYTES = b"\xff\xfe\x1b.png"


def lines_of(text: str) -> list[str]:
    """The lines of a log, each as lightship begins one and of nothing but text."""
    lines = text.split("\n")
    assert lines.pop() == ""
    for line in lines:
        assert re.match(r"\[ +\d+:\d\d\] |lightship: ", line), line
        categories = {unicodedata.category(letter) for letter in line}
        assert not categories & {"Cc", "Cs", "Zl", "Zp"}, line
        assert not set(line) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"), line
    return lines


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of hostile classes, one of whose images has a hostile name and cannot be read."""
    folder = tmp_path_factory.mktemp("hostile")
    for path, data in little_set(("train", "test"), per_class=8, classes=CLASSES).items():
        (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / path).write_bytes(data)
    (folder / "images" / "train" / CLASSES[1] / FORGED).write_bytes(b"\x89PNG no image")
    (folder / "images" / "test" / CLASSES[1] / f"{FORGED}.png").write_bytes(encoded(
        pixels_of(next(iter(little_set().values())))))  # fmt: skip
    return folder


def fit(run: Path, *flags: str) -> int:
    return cli.main(
        ["fit", f"--data.root={run}/images", f"--run.output={run}/run", "--run.tracking=offline",
         "--data.global_batch_size=6", "--trainer.max_epochs=1",
         "--run.log_format=text", "--data.image_size_px=16", *flags]
    )  # fmt: skip


def test_a_fit_names_them_in_lines_of_its_own(run: Path, capsys) -> None:
    assert fit(run) == 65
    assert "\\x1b[2J\\x9b1m\\n[   0:00] done: forged" in lines_of(capsys.readouterr().err)[-1]
    assert fit(run, "--data.on_error=skip", "--data.max_bad_fraction=0.5") == 0
    lines = lines_of(capsys.readouterr().err)
    assert any("forged" in line for line in lines)
    page = (run / "run" / "report" / "report.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert not set(page) & set("\x1b\x9b\x85\u2028\u202e")
    numbers = json.loads((run / "run" / "report" / "report.json").read_text())
    assert sorted(numbers["class_names"]) == sorted(CLASSES)


def test_json_lines_stay_one_event_each(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "new").mkdir()
    picture = encoded(pixels_of(next(iter(little_set().values()))))
    for name in (os.fsencode(FORGED), BYTES, b"=1+1.png", b"fine.png"):
        Path(os.fsdecode(os.fsencode(tmp_path / "new") + b"/" + name)).write_bytes(picture)
    Path(os.fsdecode(os.fsencode(tmp_path / "new") + b"/bad-" + BYTES)).write_bytes(b"\x89PNG no")
    tables = {ending: tmp_path / f"table.{ending}" for ending in ("csv", "jsonl")}
    for table in tables.values():
        flags = ["--data.on_error=skip", "--data.max_bad_fraction=0.5", "--run.log_format=json"]
        of_run = [f"--run.output={run}/run", f"--data.root={tmp_path}/new"]
        assert cli.main(["predict", *of_run, f"--predictions={table}", *flags]) == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    texts = [event["text"] for event in events if "text" in event]
    assert any("bad-" in text for text in texts)
    for text in texts:
        text.encode()
        assert text.isprintable()
    rows = [json.loads(line) for line in tables["jsonl"].read_text().split("\n")[:-1]]
    assert FORGED in {row["path"] for row in rows}
    with tables["csv"].open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert {"'=1+1.png", "'=cmd|' 'A0", FORGED} & set(cells) >= {"'=1+1.png", FORGED}
    assert not [cell for cell in cells if re.match(r"[=+\-@\t\r\n]", cell)]


def test_what_a_command_line_or_a_class_holds_is_refused_in_one_line(
    tmp_path: Path, capsys
) -> None:
    for flags in ([f"--data.root={FORGED}"], [f"--data.{FORGED}"], [f"--run.seed={FORGED}"]):
        assert cli.main(["fit", *flags]) in (2, 65, 78)
        lines = lines_of(capsys.readouterr().err)
        first = [line for line in lines if "] loading PyTorch and Lightning" in line]
        assert len(lines) == len(first) + 1
    (tmp_path / "train" / "\x1b]0;title\x07").mkdir(parents=True)
    (tmp_path / "train" / "a").mkdir()
    for folder in (tmp_path / "train").iterdir():
        (folder / "0.png").write_bytes(next(iter(little_set().values())))
    assert cli.main(["fit", f"--data.root={tmp_path}", f"--run.output={tmp_path}/run"]) == 65
    assert "\\x1b]0;title" in lines_of(capsys.readouterr().err)[-1]
