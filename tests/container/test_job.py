"""k8s/job.yaml through overlays/cpu: two pods that train on S3, and everything that befalls them.

Each case ends by comparing with the same run without containers, bit for bit.
"""

import subprocess
import time
from collections.abc import Callable

import pytest

from lightship import storage
from tests.container.conftest import CPU, Run, assert_same
from tests.container.engine import podman
from tests.support.manifests import of_kind

HARM_AT_STEP = 60


def recovered(run: Run, measured: Callable, what: str) -> None:
    """Wait for a checkpoint that is newer than all there are."""
    before = run.committed()
    with measured(what):
        run.at_step(before + 1)


def wandb_ids(output: str) -> set[str]:
    """Ids of the W&B runs kept beside a run."""
    files = storage.list_files(f"{output}/logs/wandb")
    folders = {file.path.split("/")[0] for file in files}
    return {folder.rsplit("-", 1)[1] for folder in folders}


def test_two_pods(run, reference) -> None:
    it = run()
    it.at_step(20)
    pods = dict(it.job.active)
    assert len({pod.address for pod in pods.values()}) == 2
    it.job.until(lambda: pods[0].probe("startupProbe"), "the heartbeat", 30)
    assert all(pod.probe("livenessProbe") for pod in pods.values())
    it.finish()
    assert it.job.codes()[0][1:] == (0, "Succeeded")
    assert not it.job.counted
    assert not it.job.ignored
    assert len(wandb_ids(it.output)) == 1
    assert_same(it.output, reference)
    again = Run(it.output, folder=it.job.folder)  # kubectl apply, once more: it is DONE
    try:
        assert again.job.finish() == "Complete"
        assert "run already complete" in again.job.story()
    finally:
        again.job.remove()


def test_the_probes_tell_the_dead(image) -> None:
    """In the image, without Python: no file yet, a fresh one, one of an hour ago."""
    [job] = of_kind(CPU, "Job")
    [container] = job["spec"]["template"]["spec"]["containers"]
    started, alive = (container[f"{k}Probe"]["exec"]["command"] for k in ("startup", "liveness"))
    name = "lightship-probed"
    podman("run", "--detach", "--rm", "--name", name, "--entrypoint", "sleep", image, "600")
    try:

        def code(*command: str) -> int:
            done = subprocess.run(["podman", "exec", name, *command], capture_output=True)
            return done.returncode

        assert code(*started) != 0
        assert code("touch", "/tmp/heartbeat") == 0
        assert code(*started) == 0
        assert code(*alive) == 0
        assert code("touch", "-d", "1 hour ago", "/tmp/heartbeat") == 0
        assert code(*alive) != 0
    finally:
        podman("rm", "--force", "--time", "0", name)


@pytest.mark.parametrize("index", [1, 0])
def test_a_pod_is_killed(run, reference, measured, index: int) -> None:
    it = run()
    it.at_step(HARM_AT_STEP)
    it.job.active[index].signal("KILL")
    host = ", which hosts the rendezvous" if index == 0 else ""
    recovered(it, measured, f"kill -9 of pod {index}{host}")
    it.finish()
    assert (index, 137, "Count") in it.job.codes(), it.job.story()
    if index == 0:
        assert (1, 75, "Ignore") in it.job.codes(), it.job.story()
    assert it.job.counted == {index: 1}
    assert_same(it.output, reference)


def test_both_are_killed(run, reference, measured) -> None:
    it = run()
    it.at_step(HARM_AT_STEP)
    for pod in it.job.active.values():
        pod.signal("KILL")
    recovered(it, measured, "kill -9 of both pods")
    it.finish()
    assert it.job.counted == {0: 1, 1: 1}
    assert_same(it.output, reference)


def test_a_pod_is_evicted(run, reference, measured) -> None:
    it = run()
    it.at_step(HARM_AT_STEP)
    with measured("SIGTERM to pod 1: it has saved and ended"):
        it.job.evict(1)
    recovered(it, measured, "SIGTERM to pod 1 (eviction)")
    it.finish()
    codes = it.job.codes()
    assert (1, 143, "Ignore") in codes, it.job.story()
    assert (0, 143, "Ignore") in codes, it.job.story()
    assert not it.job.counted  # an eviction costs nothing
    assert len(wandb_ids(it.output)) == 1
    assert_same(it.output, reference)


def test_a_pod_is_frozen(run, reference, measured) -> None:
    it = run()
    it.at_step(HARM_AT_STEP)
    pod = it.job.active[1]
    with measured("pod 1 paused: the 60 s, until both train again"):
        before = it.committed()
        pod.freeze()
        last_s = pod.heartbeat_s
        end = time.monotonic() + 60
        while time.monotonic() < end:
            it.job.sync()
            time.sleep(1)
        assert pod.heartbeat_s == last_s
        pod.thaw()
        it.at_step(before + 21)
    it.finish()
    assert_same(it.output, reference)


def test_a_pod_is_cut_off(run, reference, measured) -> None:
    it = run()
    it.at_step(HARM_AT_STEP)
    it.job.active[1].cut()
    recovered(it, measured, "pod 1 cut from the network, for good")
    it.finish()
    assert any(index == 1 and code in (74, 75) for index, code, _ in it.job.codes())
    assert_same(it.output, reference)


def test_storage_is_away(run, reference, measured, s3_pod) -> None:
    it = run()
    it.at_step(HARM_AT_STEP)
    before = it.committed()
    with measured("S3 away for 30 s: they included"):
        s3_pod.freeze()
        time.sleep(30)
        s3_pod.thaw()
        it.at_step(before + 1)
    it.finish()
    assert_same(it.output, reference)


def test_a_pod_is_out_of_memory(run, reference, measured) -> None:
    it = run()
    it.at_step(HARM_AT_STEP)
    it.job.active[1].run_out_of_memory()
    recovered(it, measured, "OOM kill of pod 1")
    it.finish()
    assert (1, 137, "Count") in it.job.codes(), it.job.story()
    assert_same(it.output, reference)


def test_a_pod_comes_late(run, reference, measured) -> None:
    with measured("pod 1 comes 60 s late: from the start to the first checkpoint"):
        it = run(late_s={1: 60.0})
        it.at_step(1)
    it.finish()
    assert it.job.codes()[0][1:] == (0, "Succeeded"), it.job.story()
    assert_same(it.output, reference)


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--run.nonsense", "1"), 2),
        (("--data.root", "s3://lightship/nothing.zip"), 65),
        (("--trainer.max_epochs", "-7"), 78),
    ],
    ids=["usage", "data", "config"],
)
def test_a_wrong_command_fails_the_job_at_once(run, flags: tuple[str, ...], code: int) -> None:
    it = run(*flags)
    assert it.job.finish(90).startswith("Failed: PodFailurePolicy"), it.job.story()
    assert it.job.starts == 2  # one try
    assert it.job.codes()[0][1:] == (code, "FailJob"), it.job.story()
