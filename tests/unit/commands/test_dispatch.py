"""What every command on images does before its own work."""

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
