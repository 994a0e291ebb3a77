"""`lightship test` on images of other classes, and on runs that cannot be written to."""

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lightship import cli
from tests.support.images import Files, little_set, put

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on seven classes, and its images."""
    folder = tmp_path_factory.mktemp("trained")
    root = put(str(folder / "images"), images(NAMES, ("train", "test")))
    flags = [
        f"--data.root={root}", f"--run.output={folder}/run", "--run.tracking=none",
        "--data.image_size_px=16", "--data.global_batch_size=7", "--trainer.max_epochs=1",
        "--optim.lr=0.01", "--run.log_images=0",
    ]  # fmt: skip
    assert cli.main(["fit", *flags]) == 0
    return folder


def images(names: tuple[str, ...], splits: tuple[str, ...] = ("test",)) -> Files:
    return little_set(splits, per_class=6, classes=names)


def test_a_test_set_with_fewer_classes(folder: Path, tmp_path: Path) -> None:
    names = ("bee", "eel", "gnu")
    root = put(str(tmp_path / "images"), images(names))
    run = [f"--run.output={folder}/run", f"--data.root={root}"]
    assert cli.main(["test", *run]) == 0
    numbers = json.loads((folder / "run" / "report" / "test.json").read_text())
    assert cli.main(["predict", *run, f"--predictions={tmp_path}/t.jsonl"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    true = np.array([row["path"].split("/")[1] for row in rows])
    guess = np.array([row["class"] for row in rows])
    best = [[each["class"] for each in row["top5"]] for row in rows]
    recall = [np.mean(guess[true == name] == name) for name in names]
    f1 = [
        2
        * np.sum((true == name) & (guess == name))
        / (np.sum(true == name) + np.sum(guess == name))
        for name in {*true, *guess}
    ]
    assert numbers["test/num_samples"] == len(rows) == 18
    assert numbers["test/acc"] == pytest.approx(np.mean(true == guess))
    assert numbers["test/balanced_acc"] == pytest.approx(np.mean(recall))
    assert numbers["test/f1"] == pytest.approx(np.mean(f1))
    assert numbers["test/top5"] == pytest.approx(
        np.mean([name in five for name, five in zip(true, best, strict=True)])
    )


@pytest.fixture
def published(folder: Path) -> Iterator[str]:
    """The URL of the run on a web server, which takes no files."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/run"
    server.shutdown()
    server.server_close()


def test_a_run_that_cannot_be_written_to(folder: Path, published: str, capfd) -> None:
    [checkpoint, *_] = (folder / "run" / "checkpoints").glob("*.ckpt")
    flags = [f"--run.output={published}", f"--ckpt_path={checkpoint}"]
    assert cli.main(["test", *flags]) == 0
    lines = capfd.readouterr().err.splitlines()
    assert "test/acc" in lines[-2]
    assert "the metrics are only in this log: " in lines[-1]
    assert "report/test.json" in lines[-1]
