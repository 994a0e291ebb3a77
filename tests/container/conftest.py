"""An image, a network, an S3 server in a pod, and Jobs on them; all of it gone at the end."""

import copy
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightship import storage
from lightship.checkpoint.store import CheckpointStore
from tests.container import engine
from tests.container.job_controller import Job
from tests.container.pods import NETWORK, Pod
from tests.support.manifests import ROOT, of_kind, rendered

CPU, LOCAL_S3 = "k8s/overlays/cpu", "k8s/overlays/local-s3"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # the first one builds the image
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(1500))


def readme_commands(tool: str) -> list[list[str]]:
    """The README's commands of docker or kubectl, without that word."""
    lines = (ROOT / "README.md").read_text().splitlines()
    found = [line.strip() for line in lines if line.startswith(f"    {tool} ")]
    return [shlex.split(line)[1:] for line in found]


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine on which podman works; a folder."""
    folder = tmp_path_factory.mktemp("podman")
    engine.make_ready(folder)
    return folder


@pytest.fixture(scope="session")
def image(machine: Path) -> str:
    """The image for CPUs, built as the README says; its name."""
    [command] = [c for c in readme_commands("docker") if c[0] == "build" and "cpu" in c]
    spent_s = engine.build(command[1:], machine)
    name = command[command.index("--tag") + 1]
    print(f"\nbuilt {name} in {spent_s:.0f} s")
    return name


@pytest.fixture(scope="session")
def network(machine: Path) -> Iterator[str]:
    if engine.exists("network", NETWORK):
        for pod in engine.podman("pod", "ps", "--quiet", "--filter", f"network={NETWORK}").split():
            engine.podman("pod", "rm", "--force", "--time", "0", pod)
        engine.podman("network", "rm", "--force", NETWORK)
    engine.podman("network", "create", NETWORK)
    yield NETWORK
    engine.podman("network", "rm", "--force", NETWORK, check=False)


@pytest.fixture(scope="session")
def s3_pod(machine: Path, image: str, network: str) -> Iterator[Pod]:
    """overlays/local-s3, played: the server, and the digits in its bucket."""
    objects = list(rendered(LOCAL_S3))
    [server] = of_kind(LOCAL_S3, "Pod")
    engine.make_s3_image(server["spec"]["containers"][0]["image"], machine)
    pod = Pod("s3", server["spec"], server["metadata"], ["s3"], objects, machine)
    pod.start()
    before = dict(os.environ)
    try:
        [secret] = of_kind(LOCAL_S3, "Secret")
        keys = secret["stringData"]
        os.environ |= {name: keys[name] for name in keys if name.startswith("AWS_")}
        os.environ["AWS_ENDPOINT_URL"] = f"http://{pod.address}:8333"
        os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
        [filling] = of_kind(LOCAL_S3, "Job")
        template = filling["spec"]["template"]
        for attempt in range(10):  # as its Job would try again
            filler = Pod(
                f"digits-{attempt}", template["spec"], template.get("metadata", {}),
                ["digits"], objects, machine,
            )  # fmt: skip
            filler.start()
            code = wait_for(lambda pod=filler: pod.exit_code, "the digits")
            said = filler.said
            filler.remove()
            if code == 0:
                break
            time.sleep(2)
        assert code == 0, f"{said}\n{pod.said}"
        yield pod
    finally:
        os.environ.clear()
        os.environ.update(before)
        pod.remove()


def wait_for(value: Callable[[], Any], what: str, bound_s: float = 120) -> Any:
    """The first value that is not None."""
    end = time.monotonic() + bound_s
    while (found := value()) is None:
        assert time.monotonic() < end, f"waited {bound_s} s for {what}"
        time.sleep(0.2)
    return found


def config() -> dict[str, Any]:
    """The configuration in the CPU overlay."""
    [found] = of_kind(CPU, "ConfigMap")
    return yaml.safe_load(found["data"]["config.yaml"])


class Run:
    """A Job of the CPU overlay with an output of its own, and what it leaves."""

    def __init__(self, output: str, *flags: str, **options: Any) -> None:
        objects = copy.deepcopy([*rendered(CPU), *of_kind(LOCAL_S3, "Secret")])
        self.output = output
        [job] = [each for each in objects if each["kind"] == "Job"]
        container = job["spec"]["template"]["spec"]["containers"][0]
        container["args"] += ["--run.output", output, *flags]
        self.job = Job(objects, **options)

    def committed(self) -> int:
        return committed(self.output)

    def at_step(self, step: int, bound_s: float = 180) -> None:
        """Wait until a checkpoint of `step` or later is there."""
        self.job.until(lambda: self.committed() >= step, f"step {step}", bound_s)

    def finish(self) -> None:
        assert self.job.finish() == "Complete", self.job.story()


def committed(output: str) -> int:
    """Step of the newest commit record, 0 if there is none."""
    try:
        files = storage.list_files(f"{output}/checkpoints")
    except storage.NotFound:
        return 0
    steps = [re.search(r"step-(\d+)\S*\.commit\.json$", file.path) for file in files]
    return max((int(match[1]) for match in steps if match), default=0)


def weights(output: str) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint: weights and optimizer."""
    store = CheckpointStore(f"{output}/checkpoints")
    newest = store.newest()
    assert newest is not None
    checkpoint = store.load_checkpoint(store.url_of(newest))
    tensors = dict(checkpoint["state_dict"])
    for index, state in checkpoint["optimizer_states"][0]["state"].items():
        tensors |= {f"{index}.{k}": v for k, v in state.items() if torch.is_tensor(v)}
    return tensors


def assert_same(output: str, expected: str) -> None:
    """Bit for bit the same weights, optimizer and numbers."""
    got, wanted = weights(output), weights(expected)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name
    done = [yaml.safe_load(storage.read_bytes(f"{url}/DONE")) for url in (output, expected)]
    assert done[0] == done[1]


@pytest.fixture
def run(s3_pod: Pod, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable]:
    """Makes Jobs; their pods are removed at the end."""
    made: list[Run] = []

    def make(*flags: str, **options: Any) -> Run:
        name = re.sub(r"\W+", "-", request.node.name).strip("-")
        output = f"s3://lightship/runs/{name}-{len(made)}-{time.time_ns()}"
        made.append(Run(output, *flags, folder=tmp_path, **options))
        return made[-1]

    yield make
    for each in made:
        each.job.remove()


@pytest.fixture(scope="session")
def reference(s3_pod: Pod, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same run on this machine without containers: two processes, the output a folder."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "config.yaml").write_text(yaml.safe_dump(config()))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PET_NPROC_PER_NODE": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "lightship", "fit", "--config", "config.yaml",
         "--run.output", "run", "--run.tracking", "none"],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return str(folder / "run")


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Iterator[Callable]:
    """Times recoveries; all are printed at the end."""
    rows: list[tuple[str, float]] = []

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        began_s = time.monotonic()
        yield
        rows.append((what, time.monotonic() - began_s))

    yield timed
    say(request, "recovery: until a checkpoint newer than all before the fault is committed:")
    for what, spent_s in rows:
        say(request, f"  {spent_s:6.1f} s  {what}")


def say(request: pytest.FixtureRequest, text: str) -> None:
    """Print for the person who runs the tests."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{text}" if not text.startswith(" ") else text, flush=True)
