"""`lightship predict` on 10,000 images: one table, however many processes make it and die."""

import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.dist.conftest import Agent, Job, until
from tests.support.images import encoded, zipped

IMAGES, PART = 10_000, 1024


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A zip of 10,000 images without labels."""
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 8, 8, 3), dtype=np.uint8)
    files = {f"{i // 1000}/{i:05d}.png": encoded(pixels[i]) for i in range(IMAGES)}
    path = tmp_path_factory.mktemp("many") / "images.zip"
    path.write_bytes(zipped(files))
    return str(path)


class Prediction:
    """Starts of one `lightship predict` on a trained run's checkpoint."""

    def __init__(self, job: Job, trained: Job, root: str) -> None:
        self.job, self.root = job, root
        job.output = trained.output
        self.table = job.folder / "table.csv"

    def start(self, processes: int, step_s: float = 0.0, **env: str) -> Agent:
        return self.job.start(
            f"--data.root={self.root}",
            f"--trainer.devices={processes}",
            f"--predictions={self.table}",
            command="predict",
            hook="predicting",
            step_s=step_s,
            **env,
        )

    def finish(self, processes: int) -> str:
        """The table's sha256."""
        agent = self.start(processes)
        assert agent.wait() == 0, agent.said
        assert f"done: {IMAGES} predictions" in agent.said
        return self.sha256()

    def sha256(self) -> str:
        assert not self.parts_path.exists(), "parts go when the table is there"
        return hashlib.sha256(self.table.read_bytes()).hexdigest()

    @property
    def parts_path(self) -> Path:
        return Path(f"{self.table}.parts")

    def parts(self) -> dict[str, int]:
        """Name -> modification time of each part that is there."""
        return {path.name: path.stat().st_mtime_ns for path in self.parts_path.glob("*-*.jsonl")}

    def predicted(self) -> list[int]:
        """Ids of all images that went through the net, in the starts so far."""
        path = self.job.folder / "predicted"
        lines = path.read_text().splitlines() if path.exists() else []
        return [i for line in lines for i in json.loads(line)["ids"] if i >= 0]


@pytest.fixture(scope="module")
def tables() -> dict[str, str]:
    """sha256 of what nobody disturbed."""
    return {}


@pytest.fixture
def prediction(job: Callable[..., Job], reference: Job, many: str) -> Prediction:
    return Prediction(job(), reference, many)


@pytest.fixture
def expected(prediction: Prediction, tables: dict[str, str]) -> str:
    """The sha256 of one process's table, made once."""
    if not tables:
        tables["1"] = prediction.finish(1)
        assert sorted(prediction.predicted()) == list(range(IMAGES))
        rows = prediction.table.read_text().splitlines()
        assert len(rows) == IMAGES + 1
        assert rows[1].startswith("0/00000.png,")
        (prediction.job.folder / "predicted").unlink()
        prediction.table.unlink()
    return tables["1"]


@pytest.mark.parametrize("processes", [2, 3])
def test_same_table_from_several(prediction: Prediction, expected: str, processes: int) -> None:
    assert prediction.finish(processes) == expected
    assert sorted(prediction.predicted()) == list(range(IMAGES))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1)])
def test_killed_and_started_again(
    prediction: Prediction, expected: str, before: int, after: int
) -> None:
    agent = prediction.start(before, step_s=0.2)
    until(lambda: len(prediction.parts()) >= 3, "three parts")
    agent.kill(signal.SIGKILL)
    assert agent.wait() == -signal.SIGKILL
    for rank in range(before if before > 1 else 0):
        until(lambda rank=rank: not Path(f"/proc/{prediction.job.worker(rank)}").exists(), "ends")
    kept = prediction.parts()
    assert 3 <= len(kept) < -(-IMAGES // PART)
    assert not prediction.table.exists()
    (prediction.job.folder / "predicted").unlink()

    agent = prediction.start(after)
    assert agent.wait() == 0, agent.said
    assert f"; {len(kept) * PART} are done" in agent.said
    done = {i for name in kept for i in range(int(name[:6]) * PART, (int(name[:6]) + 1) * PART)}
    assert sorted(prediction.predicted()) == sorted(set(range(IMAGES)) - done)
    assert prediction.sha256() == expected


def test_a_crashed_process_is_healed_in_place(prediction: Prediction, expected: str) -> None:
    agent = prediction.start(2, step_s=0.2)
    until(lambda: len(prediction.parts()) >= 2, "two parts")
    pid = prediction.job.worker(1)
    kept = prediction.parts()
    Agent(pid, agent.status_path, agent.log_path).kill(signal.SIGKILL)
    until(lambda: prediction.job.worker(1) != pid, "a new process")
    assert all(prediction.parts()[name] == time for name, time in kept.items())
    assert agent.wait() == 0, agent.said
    assert "restarting all ranks from the parts that are written, 3 restarts left" in agent.said
    assert prediction.sha256() == expected


def test_told_to_stop(prediction: Prediction, expected: str) -> None:
    agent = prediction.start(2, step_s=0.2)
    until(lambda: len(prediction.parts()) >= 2, "two parts")
    agent.kill(signal.SIGTERM)
    assert agent.wait() == 143, agent.said
    assert "Traceback" not in agent.said
    assert len(prediction.parts()) >= 2
    assert prediction.finish(2) == expected
