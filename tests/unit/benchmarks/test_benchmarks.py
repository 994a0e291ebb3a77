"""`make bench` itself: its arms run and its tables come out, at a size that takes seconds."""

import subprocess
import sys

from benchmarks import table
from tests.support.images import little_set, put


def test_spread_gives_median_and_range() -> None:
    assert table.spread([3.0, 1.0, 2.0], 1) == "2.0 (1.0-3.0)"
    assert table.spread([1234.0]) == "1,234"


def test_an_unknown_table_is_named() -> None:
    command = [sys.executable, "-m", "benchmarks", "tutorail"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no table 'tutorail'; there are " in done.stderr
    assert "tutorial" in done.stderr


def test_without_the_data_the_cell_says_not_run(monkeypatch, capsys) -> None:
    from benchmarks import tutorial

    monkeypatch.delenv("CIFAR10", raising=False)
    tutorial.main()
    assert capsys.readouterr().out.startswith("not run: set CIFAR10")


def test_the_peer_and_lightship_run_on_the_same_folder(tmp_path) -> None:
    names = tuple("abcdefghij")
    files = little_set(("train", "test"), per_class=10, classes=names, size_px=(32, 32))
    root = put(str(tmp_path / "images"), files)
    peer = table.run_json("benchmarks.tutorial_as_written", root, "0", "1", f"{tmp_path}/peer")
    assert peer["images"] == 32 * 3  # 90 images, 10 held out
    assert 0 <= peer["test/acc"] <= 1
    ours = table.run_json(
        "benchmarks.one_fit", f"{tmp_path}/run", "--config=tutorial",
        f"--data.root={root}", "--trainer.max_epochs=1", "--run.tracking=none",
    )  # fmt: skip
    assert ours["steps"] == 2
    assert ours["fit_s"] > 0
    assert ours["test/num_samples"] == 100
    assert table.run_json("benchmarks.bare_loop", "8", "1", "0", "16")["images"] == 16


def test_each_stack_takes_its_steps_and_lightship_waits_for_nothing(monkeypatch, tmp_path) -> None:
    from benchmarks import step_overhead

    monkeypatch.setattr(step_overhead, "WARM_UP", 5)
    monkeypatch.setattr(step_overhead, "STEPS", 10)
    monkeypatch.setenv("TRACKING", "none")
    monkeypatch.setattr(step_overhead.Clocked, "work", 1)
    for arm in step_overhead.ARMS.values():
        step = step_overhead.measure(arm)
        assert step.whole > step.net > 0
        assert len(step_overhead.Clocked.times) == 16
    assert step_overhead.syncs(step_overhead.lightship) == "0"


def test_the_records_arms_run_on_little(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("BATCH", "20")  # bf16 is slow on processors without it
    names = tuple("abcdefghij")
    files = little_set(("train", "test"), per_class=1, classes=names, size_px=(32, 32))
    files |= {
        f"train/{name}/{i}.png": files[f"train/{name}/000.png"] for name in names for i in range(2)
    }
    root = put(str(tmp_path / "images"), files)
    done = table.run_json("benchmarks.speed_bare", root, "1", "1")
    assert done["images"] == 20


def test_without_a_checkout_the_records_cells_say_not_run(monkeypatch, capsys) -> None:
    from benchmarks import speed

    monkeypatch.setattr(speed, "RUNS", 0)
    monkeypatch.setenv("CIFAR10", "somewhere")
    monkeypatch.delenv("AIRBENCH_DIR", raising=False)
    speed.main()
    told = capsys.readouterr().out
    assert "| airbench94_muon, float32" in told
    assert told.count("not run") == 5 * 5


def test_resnet50_is_timed_by_both_of_its_arms(monkeypatch, tmp_path) -> None:
    from benchmarks import resnet50

    for name, value in {"BATCH": 2, "WINDOW": 1, "WINDOWS": 3, "WARM_UP": 1}.items():
        monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(resnet50, name, value)
    root = resnet50.write_images(str(tmp_path), images=120)
    assert resnet50.bare_rate(root, "") > 0
    assert resnet50.lightship_rate(root, str(tmp_path / "run")) > 0
