"""`make bench` itself: its arms run and its tables come out, at a size that takes seconds."""

import subprocess
import sys

from tests.benchmarks import table
from tests.images import little_set, put


def test_spread_gives_median_and_range() -> None:
    assert table.spread([3.0, 1.0, 2.0], 1) == "2.0 (1.0-3.0)"
    assert table.spread([1234.0]) == "1,234"


def test_an_unknown_table_is_named() -> None:
    command = [sys.executable, "-m", "tests.benchmarks", "tutorail"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no table 'tutorail'; there are " in done.stderr
    assert "tutorial" in done.stderr


def test_without_the_data_the_cell_says_not_run(monkeypatch, capsys) -> None:
    from tests.benchmarks import tutorial

    monkeypatch.delenv("CIFAR10", raising=False)
    tutorial.main()
    assert capsys.readouterr().out.startswith("not run: set CIFAR10")


def test_the_peer_and_lightship_run_on_the_same_folder(tmp_path) -> None:
    names = tuple("abcdefghij")
    files = little_set(("train", "test"), per_class=10, classes=names, size_px=(32, 32))
    root = put(str(tmp_path / "images"), files)
    peer = table.run_json(
        "tests.benchmarks.tutorial_as_written", root, "0", "1", f"{tmp_path}/peer"
    )
    assert peer["images"] == 32 * 3  # 90 images, 10 held out
    assert 0 <= peer["test/acc"] <= 1
    ours = table.run_json(
        "tests.benchmarks.one_fit", f"{tmp_path}/run", "--config=tutorial",
        f"--data.root={root}", "--trainer.max_epochs=1", "--run.tracking=none",
    )  # fmt: skip
    assert ours["steps"] == 2
    assert ours["test/num_samples"] == 100
    assert table.run_json("tests.benchmarks.bare_loop", "8", "1", "0", "16")["images"] == 16
