"""1,003 samples in batches of 64 count 1,003, and each with its own prediction."""

import csv
import json
from pathlib import Path

import pytest

from lightship import cli
from tests.support.images import little_set, put


def test_every_sample_counts_once(tmp_path: Path) -> None:
    sizes = {"train": 24, "test": 1003}
    files = {}
    for split, count in sizes.items():
        made = list(little_set((split,), per_class=-(-count // 3)).items())[: count + 2]
        files |= dict(made[:count])
    assert sum(path.startswith("test/") for path in files) == 1003
    root = f"--data.root={put(str(tmp_path / 'images'), files)}"
    run = f"--run.output={tmp_path}/run"
    flags = ["--data.image_size_px=16", "--data.global_batch_size=8", "--run.tracking=none"]
    assert cli.main(["fit", run, root, *flags, "--trainer.max_epochs=1"]) == 0
    assert cli.main(["test", run, "--data.eval_batch_size=64"]) == 0
    numbers = json.loads((tmp_path / "run" / "report" / "test.json").read_text())
    assert numbers["test/num_samples"] == 1003

    # The same accuracy from the table of predictions, one row an image.
    assert cli.main(["predict", run, "--data.eval_batch_size=64"]) == 0
    rows = list(csv.DictReader((tmp_path / "run" / "predictions.csv").open()))
    tested = [row for row in rows if "test/" in row["path"]]
    assert len({row["path"] for row in tested}) == len(tested) == 1003
    right = sum(f"/{row['class']}/" in row["path"] for row in tested)
    assert numbers["test/acc"] == pytest.approx(right / 1003, abs=1e-7)
