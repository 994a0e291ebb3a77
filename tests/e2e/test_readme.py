"""Every command of the README is run: none may stand there that is not in the table below."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.images import little_set, put

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(?:^    \S.*\n)+", re.MULTILINE)

CONTAINER = "tests/container, on podman in place of docker and of a cluster"
# Command -> what shows it. `run` here means: by `test_the_readme_from_top_to_bottom`.
SHOWN_BY = {
    "make train": "tests/e2e/test_digits.py, as test_make_targets checks",
    "make test": "this very run",
    "make lint": ".ci/run",
    "make bench": "tests/unit/test_benchmarks.py",
    "docker build --file docker/Dockerfile --target cpu --tag lightship:cpu .": CONTAINER,
    "docker run --rm --read-only --cap-drop ALL --volume runs:/workspace lightship:cpu "
    "fit --config digits": CONTAINER,
    "docker build --file docker/Dockerfile --target cuda --tag lightship:cuda .": "nothing yet",
    "docker run --rm --gpus all --shm-size 1g --volume runs:/workspace lightship:cuda "
    "fit --config cifar10": "nothing yet: it needs a GPU and docker",
    "kubectl apply --filename k8s/job.yaml": "tests/contract/test_manifests.py: valid, not run",
    "kubectl apply --kustomize k8s/overlays/local-s3": CONTAINER,
    "kubectl wait --for condition=complete --timeout 5m job/digits": CONTAINER,
    "kubectl apply --kustomize k8s/overlays/cpu": CONTAINER,
    "lightship fit --help": "run",
    "lightship fit --data.root images --data.image_size_px 32 --run.output runs/mine": "run",
    "lightship test --run.output runs/mine": "run",
    "lightship validate --run.output runs/mine": "run",
    "lightship predict --run.output runs/mine --data.root new_images --predictions table.csv": "run",  # noqa: E501
    "lightship fit --data.root s3://bucket/images --data.image_size_px 32 "
    "--run.output s3://bucket/runs/1": "run",
    "lightship pack s3://bucket/images s3://bucket/shards": "run",
    "lightship pack images shards --short_side_px 256 --quality 90 --shard_mib 128": "run",
    "lightship fit --data.root s3://bucket/shards --data.image_size_px 224 "
    "--data.crop_min_area 0.08 --model.net resnet18 --run.output s3://bucket/runs/2": "run",
    "lightship fit --config digits --trainer.devices 2 --run.output runs/two": "run",
    "lightship fit --config tutorial --config my.yaml --trainer.max_epochs 5 --print_config": "run",
    "lightship fit --config my.yaml --model.net my_nets:build": "run",
}  # fmt: skip


def commands() -> list[str]:
    """The README's commands in order (indented lines that begin with one of our tools)."""
    text = (ROOT / "README.md").read_text()
    lines = [line.strip() for block in BLOCK.findall(text) for line in block.splitlines()]
    return [line for line in lines if line.split()[0] in ("make", "lightship", "docker", "kubectl")]


def test_every_command_is_shown() -> None:
    assert set(commands()) == set(SHOWN_BY)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_make_targets() -> None:
    """`make train` is the command that test_digits.py runs, and every target explains itself."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
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


@pytest.fixture(scope="module")
def bucket(s3) -> str:
    """What `s3://bucket` of the README is here."""
    return s3.url("readme")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, bucket: str) -> Path:
    """A folder as the README's reader would have it, and the same images in a bucket."""
    path = tmp_path_factory.mktemp("desk")
    files = little_set(("train", "test"), per_class=40, image_format="jpeg")
    put(str(path / "images"), files)
    put(
        str(path / "new_images"),
        {"a.jpg": files["test/cat/000.jpeg"], "b.jpg": files["test/ant/000.jpeg"]},
    )
    put(f"{bucket}/images", files)
    (path / "my.yaml").write_text(
        "data: {root: images, image_size_px: 32, global_batch_size: 16}\ntrainer: {max_epochs: 1}\n"
    )
    (path / "my_nets.py").write_text(
        "from torch import nn\n\n\ndef build(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))\n"
    )
    return path


@pytest.mark.parametrize("command", [c for c in SHOWN_BY if SHOWN_BY[c] == "run"])
def test_the_readme_from_top_to_bottom(command: str, desk: Path, bucket: str) -> None:
    arguments = command.replace("s3://bucket", bucket).split()[1:]
    if arguments[0] == "fit" and "--help" not in arguments:
        arguments += ["--run.tracking=offline"]  # the reader's key is not ours to use
    if "resnet18" in arguments:
        arguments += ["--trainer.max_steps=2", "--data.global_batch_size=8"]  # nor the time
    done = subprocess.run(
        [sys.executable, "-m", "lightship", *arguments],
        cwd=desk, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if "predict" in arguments:
        assert len((desk / "table.csv").read_text().splitlines()) == 3
