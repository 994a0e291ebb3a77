"""Tables of `make bench` that run whole commands, at a size that takes seconds."""

import json
import re

import pytest
import timm
from safetensors.torch import save_file

from benchmarks import finetune, finetune_data, scale, start, start_imports
from lightship import host
from tests.support.images import little_set, put


def rows_of(text: str) -> list[dict[str, str]]:
    """The rows of the Markdown tables in a text, by column."""
    rows: list[dict[str, str]] = []
    head: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif set(cells[0]) != {"-"}:
            rows.append(dict(zip(head, cells, strict=True)))
    return rows


def test_scale(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("MADE", "LISTED"):
        monkeypatch.setattr(scale, name, [3000])
    monkeypatch.setattr(scale, "SIZES", [100_000])
    monkeypatch.setattr(scale, "RUNS", 1)
    scale.main()
    rows = rows_of(capsys.readouterr().out)
    orders = [row for row in rows if "order" in row]
    assert [(row["order"], row["ranks"]) for row in orders] == [
        ("2", "1"), ("2", "1024"), ("1", "1"), ("1", "1024")
    ]  # fmt: skip
    for row in orders:
        cpu_ms, wall_ms = map(float, row["batch ms"].split(" / "))
        assert 0 < cpu_ms <= 1.1 * wall_ms + 0.02
        if row["cold jump ms"]:  # not where files are in memory
            assert float(row["cold jump ms"].split(" / ")[1]) > 0
        if row["ranks"] == "1":
            assert 0.9 < float(row["quality"]) <= 1.01
    assert [row["layout"] for row in rows if "layout" in row] == ["packed", "class folders"]
    assert float(rows[-1]["bytes"]) > 0


def test_start(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 9 MB for training: 8 MiB or less are not decoded ahead."""
    files = little_set(("train",), per_class=30, size_px=(200, 200)) | little_set(("test",))
    root = put(str(tmp_path / "images"), files)
    monkeypatch.setenv("CIFAR10", root)
    monkeypatch.setattr(start, "JOBS", ["cifar10"])
    little = start._lightship(
        "--config=tutorial", "--trainer.max_steps=2", "--data.global_batch_size=8",
        "--data.image_size_px=32", "--run.tracking=none",
    )  # fmt: skip
    monkeypatch.setattr(start, "ARMS", [start.Arm("cifar10", "lightship", little)])
    start.main()
    rows = rows_of(capsys.readouterr().out)
    assert [row["start"] for row in rows] == ["1", "2"]
    for row in rows:
        line_s, step_s, whole_s = (
            float(row[name]) for name in ("first line s", "first step s", "whole s")
        )
        assert 0 < line_s < step_s < whole_s
        assert 0 <= float(row["accuracy"]) <= 1
        if host.usable_cores() > 1 and row["start"] == "1":
            assert float(row["decoded s"]) < whole_s


def test_imports(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(start_imports.ARMS, "import lightning.pytorch", "import json")
    start_imports.show(1)
    text = capsys.readouterr().out
    nothing, little, fit = (float(row["CPU s"]) for row in rows_of(text))
    assert fit > 2 * max(nothing, little)
    found = re.search(r"until it can take a task \(S3\): (\S+) CPU s", text)
    assert found
    assert nothing < float(found[1]) < fit  # it does without torch, and without s3fs
    assert "A fit's over Lightning's: wall " in text


def test_finetune(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = little_set(("train",), per_class=12) | little_set(("test",))
    root = put(str(tmp_path / "images"), files)
    weights = tmp_path / "w.safetensors"
    save_file(timm.create_model(finetune_data.NET).state_dict(), weights)
    monkeypatch.setenv("TRASHNET", root)
    monkeypatch.setenv("WEIGHTS", str(weights))
    monkeypatch.setattr(finetune, "EPOCHS", 1)
    monkeypatch.setattr(finetune, "NAMES", ["tutorial-frozen", "finetune-probe"])
    kept = tmp_path / "kept.jsonl"
    other = {
        "arm": "finetune-probe",
        "acc": 0.5,
        "macro_f1": 0.5,
        "fit_s": 1,
        "process_s": 8,
        "cpu_s": 2,
    }
    kept.write_text("".join(json.dumps(other | {"seed": seed}) + "\n" for seed in (0, 1)))
    monkeypatch.setattr(finetune, "RESULTS", str(kept))
    monkeypatch.setattr(finetune, "SEEDS", [1])
    finetune.main()
    lines = list(map(json.loads, kept.read_text().splitlines()))
    assert [(run["arm"], run["seed"]) for run in lines[2:]] == [("tutorial-frozen", 1)]
    frozen, probe = rows_of(capsys.readouterr().out)
    assert (frozen["n"], probe["n"], probe["test accuracy"]) == ("1", "2", "0.500 (0.500-0.500)")

    monkeypatch.setattr(finetune, "RESULTS", None)
    monkeypatch.setattr(finetune, "NAMES", ["finetune-probe"])
    finetune.main()
    assert len(kept.read_text().splitlines()) == 3
    for row in [frozen, *rows_of(capsys.readouterr().out)]:
        assert 0 <= float(row["macro F1"]) <= 1
        assert 0 <= float(row["test accuracy"]) <= 1
        assert float(row["CPU s"]) > 0
