"""What every command on images does before its own work."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightship import cli
from lightship.training.callbacks import heartbeat


def test_a_start_in_place_has_the_startup_probes_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of the attempt before is as old as its last batch."""
    path = tmp_path / "beat"
    path.touch()
    monkeypatch.setenv(heartbeat.VARIABLE, str(path))
    began_s = time.time()
    flags = [f"--data.root={tmp_path}/nowhere", f"--run.output={tmp_path}/run"]
    assert cli.main(["fit", "--run.tracking=none", *flags]) == 65
    assert path.stat().st_mtime >= began_s + heartbeat.START_GRACE_S - 1


def test_imports_are_not_searched_for_garbage(tmp_path: Path) -> None:
    """Neither while they go on nor later; a command's own objects are, as ever."""
    code = f"""
import gc, sys
from lightship import cli
from lightship.commands import dispatch

usual, train = gc.get_threshold(), dispatch._train_or_evaluate

def fit(command):
    searches = sum(each["collections"] for each in gc.get_stats())
    print(searches, gc.get_freeze_count(), gc.get_threshold() == usual)

def train_instead(command):
    import lightship.commands.fit
    lightship.commands.fit.fit = fit
    train(command)

dispatch._train_or_evaluate = train_instead
sys.argv = ["lightship", "fit", "--data.root=digits", "--run.output={tmp_path}/run"]
raise SystemExit(cli.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    searches, frozen, is_usual = done.stdout.split()[-3:]
    assert int(searches) < 200, "with 700 new objects for each there are a thousand"
    assert int(frozen) > 100_000
    assert is_usual == "True"
