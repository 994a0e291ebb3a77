"""Documentation that runs: each command and snippet of the pages, or it says why not.

What stands in a page is done in its order on one desk: a folder as a reader would have it, with the
same images in a bucket. Only what NOT_HERE names is not done, and then as much of it is checked as
can be. A line in a page that neither works nor is named there fails.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import forked_ranks, warm
from tests.support.faults import FaultProxy
from tests.support.images import little_set, put
from tests.support.pages import ROOT, Example, all_examples

EXAMPLES = all_examples()

_PODMAN = "docker or a cluster; tests/container does it on podman"
_CLUSTER = "a cluster; tests/contract/test_manifests.py holds what is applied to the schemas"
_TPU = "a TPU; tests/xla runs the same on XLA's CPU runtime"
# What a line lacks here, and the test that shows what can be shown -> the lines.
NOT_HERE = {
    "minutes; tests/e2e/test_digits.py runs this very command": ["make train"],
    "this very run": ["make test", "python -m pytest tests/unit/data -x -q"],
    "an environment of its own; it is the one that runs this": [
        "make setup", "source .venv/bin/activate",
    ],
    "an environment of its own or hours; these are test runs": [
        "make test-xla", "make test-dist", "make test-container", "make chaos", "make fuzz",
    ],
    "time; .ci/run does it": ["make lint"],
    "time; tests/unit/benchmarks/test_benchmarks.py runs its arms": ["make bench"],
    "a browser": ["make pictures"],
    _PODMAN: [
        "docker build --file docker/Dockerfile --target cpu --tag lightship:cpu .",
        "docker run --rm --read-only --cap-drop ALL --security-opt no-new-privileges "
        "--volume runs:/workspace lightship:cpu fit --config digits",
        "docker run --rm --user $(id -u):0 --stop-timeout 120 --volume $PWD/images:/images:ro "
        "--volume $PWD/runs:/workspace/runs lightship:cpu fit --data.root /images "
        "--data.image_size_px 32 --run.output runs/mine",
        "kubectl apply --kustomize k8s/overlays/local-s3",
        "kubectl wait --for condition=complete --timeout 5m job/digits",
        "kubectl apply --kustomize k8s/overlays/cpu",
        "kubectl wait --for condition=complete --timeout 10m job/lightship",
    ],
    "docker and a GPU": [
        "docker build --file docker/Dockerfile --target cuda --tag lightship:cuda .",
        "docker run --rm --gpus all --shm-size 1g --read-only --cap-drop ALL "
        "--security-opt no-new-privileges --volume runs:/workspace lightship:cuda "
        "fit --config cifar10",
        "docker build --file docker/Dockerfile --target cuda "
        "--tag registry.example.com/lightship:cuda-1 .",
    ],
    "a registry": [
        "docker push registry.example.com/lightship:cuda-1",
        "docker buildx imagetools inspect python:3.11-slim-bookworm",
    ],
    _CLUSTER: [
        "kind load docker-image lightship:cpu",
        "kubectl apply --filename k8s/job.yaml",
        "kubectl apply --kustomize k8s/overlays/single-gpu",
        "kubectl apply --kustomize k8s/overlays/spot",
        "kubectl apply --kustomize k8s/overlays/kueue",
        "kubectl apply --kustomize k8s/overlays/metadata",
        "kubectl create secret generic lightship "
        "--from-file=aws-credentials=$HOME/.aws/credentials "
        "--from-literal=WANDB_API_KEY=$WANDB_API_KEY",
        "kubectl get pods --selector batch.kubernetes.io/job-name=lightship --watch",
        "kubectl logs --follow --prefix --selector batch.kubernetes.io/job-name=lightship",
        "kubectl logs --selector batch.kubernetes.io/job-name=lightship --tail 20",
        "kubectl logs --prefix --tail 50 --selector batch.kubernetes.io/job-name=lightship",
        "kubectl wait --for condition=complete --timeout 168h job/lightship",
        "kubectl delete job lightship --cascade=foreground",
        "kubectl describe job lightship",
        "kubectl describe pods --selector batch.kubernetes.io/job-name=lightship",
        "kubectl apply --filename k8s/tpu.yaml",
        "kubectl apply --kustomize k8s/overlays/tpu-multihost",
        "kubectl apply --kustomize k8s/overlays/tpu-multislice",
    ],
    _TPU: [
        "pip install '.[tpu]'",
        "lightship fit --config my.yaml --trainer.accelerator tpu",
    ],
    "a second machine; tests/dist/test_launch.py runs two agents on one": [
        "PET_NNODES=2 PET_RDZV_ENDPOINT=node-0:29500 lightship fit --config my.yaml "
        "--run.output s3://bucket/runs/3",
    ],
    "a checkpoint of somebody's run; tests/e2e/test_predict.py has one, and runs this line": [
        "lightship predict --ckpt_path model.ckpt --data.root new_images.zip "
        "--predictions table.jsonl",
    ],
    "a part of the examples above it, with which tests/e2e/test_export.py runs it": [
        "from pathlib import Path\n"
        "from lightship.data.images.resize import Resize, decode_square\n\n"
        'resize = Resize(facts["interpolation"], size_px / short_px)\n'
        'data = Path("image.jpg").read_bytes()\n'
        'pixels = decode_square(data, "image", size_px, resize=resize).transpose(2, 0, 1)[None]\n',
    ],
    "the network; tests/unit/models/nets/test_published.py downloads, tests/e2e/test_finetune.py "
    "trains": [
        "lightship fit --config finetune --data.root images --run.output runs/tuned",
        "lightship fit --config finetune-probe --data.root images --run.output runs/probe",
        "lightship fit --config my.yaml --model.net resnet18 --model.weights default "
        "--model.freeze stages:3 --model.unfreeze_epoch 2 --optim.layer_decay 0.8",
    ],
    "W&B's server": ["wandb sync runs/own/logs/wandb/offline-run-*"],
}  # fmt: skip
REASONS = {line: reason for reason, lines in NOT_HERE.items() for line in lines}

# Lines that would take minutes, or epochs that say no more -> what makes them short here.
SHORTENED = {
    "fit --data.root s3://bucket/images ": " --trainer.max_epochs=5",
    "--model.net resnet18": " --trainer.max_steps=2 --data.global_batch_size=8 "
    "--trainer.limit_val_batches=1 --trainer.limit_test_batches=1",
    "--config digits --trainer.devices 2": " --trainer.max_epochs=1",
}
READABLE = ("command", "python")
TOOLS = {"lightship", "python", "cat", "head", "ls"}
"""What may be called here: on every machine it is there, and the same."""
DONE_HERE = [
    example
    for example in EXAMPLES
    if example.kind in READABLE and not example.file and example.text not in REASONS
]
NAMED = [example for example in EXAMPLES if example.kind == "command" and example.text in REASONS]


# ---- the lists ---------------------------------------------------------------------------------


def test_the_list_of_what_is_not_done_is_exact() -> None:
    """It has no line that is in no page, and the tests it names are there."""
    assert set(REASONS) <= {example.text for example in EXAMPLES}
    for reason in NOT_HERE:
        for path in re.findall(r"(?:tests/|\.ci/)[\w/.]+", reason):
            assert (ROOT / path).exists(), reason


def test_every_block_is_of_a_kind_that_is_read() -> None:
    kinds = {example.kind for example in EXAMPLES}
    assert kinds <= {*READABLE, "yaml", "json", "text", "mermaid"}, (
        "another kind needs its own test"
    )
    for example in EXAMPLES:
        if example.kind == "yaml":
            assert example.file, f"{example}: the first line must name the file, to be used here"


def test_only_tools_that_are_everywhere_are_called() -> None:
    for example in DONE_HERE:
        if example.kind == "command":
            assert _tool_and_rest(example.text)[0] in TOOLS, f"{example}: name it in NOT_HERE"


# ---- what cannot be done here, as far as it can be checked --------------------------------------


@pytest.mark.parametrize("example", NAMED, ids=str)
def test_what_is_not_done_is_well_formed(example: Example, desk: Path, tmp_path: Path) -> None:
    """Flags that exist, files that are there; of a container the command within."""
    line = example.text
    for path in re.findall(r"\b(?:k8s|docker)/[\w/.-]+", line):
        assert (ROOT / path).exists(), path
    tool, rest = _tool_and_rest(line)
    inside = line.partition(" lightship:")[2].partition(" ")[2]
    if tool == "make":
        _need("make")
        command = ["make", "--dry-run", *rest.split()]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    if tool == "lightship" or " fit " in f" {inside} ":
        words = (rest if tool == "lightship" else inside).split()
        _lightship(*words, "--print_config", cwd=desk)
    if tool in ("kubectl", "docker"):
        _need(tool)
        words = [tool, *shlex.split(rest)]
        at = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
        words.insert(at, "--help")  # then it parses the flags, and does nothing
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def _tool_and_rest(line: str) -> tuple[str, str]:
    """A command's first word, without variables set before it, and what follows."""
    tool, _, rest = re.sub(r"^(?:\w+=\S+ )+", "", line).partition(" ")
    return tool, rest


def _need(tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed: its flags cannot be checked")


def _lightship(*arguments: str, cwd: Path) -> None:
    command = [warm.executable(), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_make_targets() -> None:
    """`make train` is the command that test_digits.py runs, and every target explains itself."""
    _need("make")
    dry = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "train"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert dry.stdout.splitlines()[-1].endswith("lightship fit --config digits")
    told = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for target in ("setup", "train", "test", "lint", "bench", "lock", "clean"):
        assert f"make {target} " in told


# ---- what is done ------------------------------------------------------------------------------


class S3Witness(FaultProxy):
    """A proxy that notes which of a policy's actions each request needs."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.needed: set[str] = set()

    def take_fault(self, method: str, path: str = "") -> str:
        """Note the action."""
        place, _, query = path.partition("?")
        is_object = "/" in place.strip("/")
        if method in ("GET", "HEAD"):
            action = "GetObject" if is_object else "ListBucket"
        elif method == "DELETE" and "uploadId=" in query:
            action = "AbortMultipartUpload"
        elif method == "DELETE":
            action = "DeleteObject"
        else:
            action = "PutObject" if is_object else f"{method} {path}"
        self.needed.add(f"s3:{action}")
        return super().take_fault(method, path)


@pytest.fixture(scope="module")
def witness(s3) -> Iterator[S3Witness]:
    with S3Witness(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def bucket(s3) -> str:
    """What `s3://bucket` of the pages is here."""
    return s3.url("pages")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages' reader would have it, with the files that the pages show."""
    path = tmp_path_factory.mktemp("desk")
    files = _images()
    put(str(path / "images"), files)
    put(str(path / "new_images"), _new(files))
    (path / "image.jpg").write_bytes(next(iter(files.values())))
    (path / "my.yaml").write_text(
        "data: {root: images, image_size_px: 32, global_batch_size: 16}\ntrainer: {max_epochs: 1}\n"
    )
    for example in EXAMPLES:
        if example.file:
            assert not (path / example.file).exists(), f"{example}: shown twice"
            (path / example.file).write_text(example.text)
    tools = path / ".tools"
    tools.mkdir()
    for name, started in (("lightship", warm.executable()), ("python", sys.executable)):
        (tools / name).write_text(f'#!/bin/sh\nexec {started} "$@"\n')
        (tools / name).chmod(0o755)
    return path


@pytest.fixture(scope="module")
def stocked(desk: Path, bucket: str) -> None:
    """The desk's images in the bucket, and in a zip there with a folder `images`."""
    put(f"{bucket}/images", _images())
    put(f"{bucket}/new_images", _new(_images()))
    put(f"{bucket}/new", _new(_images()))
    archive = shutil.make_archive(str(desk / ".images"), "zip", desk, "images")
    put(bucket, {"images.zip": Path(archive).read_bytes()})


def _images() -> dict[str, bytes]:
    return little_set(("train", "test"), per_class=24, image_format="jpeg")


def _new(files: dict[str, bytes]) -> dict[str, bytes]:
    return {"a.jpg": files["test/cat/000.jpeg"], "b.jpg": files["test/ant/000.jpeg"]}


@pytest.mark.parametrize("example", DONE_HERE, ids=str)
def test_it_works(
    example: Example, desk: Path, stocked: None, bucket: str, s3, witness: S3Witness
) -> None:
    text = example.text
    web = f"http://127.0.0.1:{s3.ports[2]}/buckets/{bucket.removeprefix('s3://')}"
    for shown, here in (
        ("s3://bucket", bucket),
        ("http://minio:9000", witness.endpoint),
        ("https://example.com", web),
    ):
        text = text.replace(shown, here)
    text += "".join(flags for part, flags in SHORTENED.items() if part in example.text)
    environment = {
        **os.environ,
        "PATH": f"{desk}/.tools:{os.environ['PATH']}",
        "AWS_ENDPOINT_URL": witness.endpoint,
        "WANDB_MODE": "offline",  # the reader's key is not ours to use
        "LIGHTSHIP_CACHE": f"{desk}/.cache",
        "no_proxy": "127.0.0.1",
        forked_ranks.VARIABLE: "1",
    }
    tool = [sys.executable, "-c"] if example.kind == "python" else ["bash", "-c"]
    witness.needed.clear()
    done = subprocess.run(
        [*tool, text], cwd=desk, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    _check(example.text, desk, done.stdout, witness.needed)


def _check(text: str, desk: Path, printed: str, needed: set[str]) -> None:
    """More than the exit code, where a page promises more."""
    [policy] = [json.loads(example.text) for example in EXAMPLES if example.kind == "json"]
    allowed = {action for each in policy["Statement"] for action in each["Action"]}
    assert needed <= allowed
    if " fit " in text and "--run.output s3://" in text and "--data.root s3://" in text:
        assert needed == allowed - {"s3:AbortMultipartUpload"}, "the page asks for more than that"
    if text.endswith("--run.output runs/own"):
        assert list(desk.glob("runs/own/logs/wandb/offline-run-*")), "what `wandb sync` takes"
    if text.endswith("--predictions table.csv"):
        assert len((desk / "table.csv").read_text().splitlines()) == 3
    if "softmax" in text:
        path, name, probability, *_ = (desk / "table.csv").read_text().splitlines()[1].split(",")
        assert (path, name) == ("a.jpg", printed.split()[0])
        assert float(probability) == pytest.approx(float(printed.split()[1]), abs=1e-4)
