"""The image: what is in it, and that it trains where it may write next to nothing."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.container.conftest import readme_commands, say
from tests.container.engine import exists, podman

# What a cluster would allow it (podman's own tmpfs are off: only the image's volumes are writable).
# One thread: several wait for each other busily, which a machine that does other things too stalls.
RESTRICTED = (
    "--read-only", "--read-only-tmpfs=false", "--user=10001", "--cap-drop=ALL",
    "--security-opt=no-new-privileges", "--network=none",
    "--env=OMP_NUM_THREADS=1",
)  # fmt: skip


def run(image: str, *arguments: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["podman", "run", "--rm", *RESTRICTED, *flags, image, *arguments],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def inside(image: str, *command: str) -> str:
    """What a command in the image prints."""
    return podman("run", "--rm", *RESTRICTED, f"--entrypoint={command[0]}", image, *command[1:])


@pytest.fixture
def volume(image: str):
    name = "lightship-test-runs"
    if exists("volume", name):
        podman("volume", "rm", "--force", name)
    podman("volume", "create", name)
    yield name
    podman("volume", "rm", "--force", name)


def test_no_arguments_print_help(image: str) -> None:
    done = run(image)
    assert done.returncode == 0, done.stderr
    assert "usage: lightship COMMAND" in done.stdout


def test_the_readmes_command_trains_the_digits(image: str, volume: str, request) -> None:
    [command] = [c for c in readme_commands("docker") if c[0] == "run" and image in c]
    own = [volume + word[4:] if word.startswith("runs:") else word for word in command[1:]]
    where = own.index(image)
    began_s = time.monotonic()
    done = subprocess.run(
        ["podman", "run", *own[:where], *RESTRICTED[1:], *own[where:]],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    say(request, f"digits in a read-only container: {time.monotonic() - began_s:.0f} s")
    mounted = Path(podman("volume", "inspect", "--format", "{{.Mountpoint}}", volume))
    [output] = (mounted / "runs").iterdir()
    assert json.loads((output / "report/report.json").read_text())["test/acc"] > 0.97
    assert (output / "DONE").exists()
    assert {path.lstat().st_uid for path in output.rglob("*")} == {10001}


def test_a_stop_is_answered_and_gone_on_from(image: str, volume: str) -> None:
    """SIGTERM to process 1 reaches lightship, which saves; the same command goes on."""
    flags = (f"--volume={volume}:/workspace", "--name=lightship-stopped")
    fit = ("fit", "--config", "digits", "--run.output", "run", "--run.tracking", "none",
           "--trainer.max_epochs", "4")  # fmt: skip
    first = subprocess.Popen(
        ["podman", "run", *RESTRICTED, *flags, image, *fit, "--run.checkpoint_every_steps", "5"]
    )
    try:
        mounted = Path(podman("volume", "inspect", "--format", "{{.Mountpoint}}", volume))
        end = time.monotonic() + 120
        while not list(mounted.glob("run/checkpoints/*.commit.json")):
            assert time.monotonic() < end, "nothing is saved"
            time.sleep(0.1)
        podman("kill", "--signal", "TERM", "lightship-stopped")
        assert first.wait(60) == 143
    finally:
        podman("rm", "--force", "--time", "0", "lightship-stopped", check=False)
        first.wait(60)
    again = run(image, *fit, flags=flags)
    assert again.returncode == 0, again.stderr
    assert "from step" in again.stderr


def test_any_user_of_group_0(image: str) -> None:
    """As OpenShift starts it: a number that nobody has heard of."""
    flags = ("--user=1000670000:0",)
    fit = ("fit", "--run.tracking", "none", "--trainer.max_steps", "3", "--run.log_images", "0")
    done = run(image, *fit, flags=flags)
    assert done.returncode == 0, done.stderr


def test_little_shared_memory_is_told(image: str) -> None:
    """Where several GPUs would need it; the check itself, on a real /dev/shm of docker's size."""
    code = (
        "import sys\nfrom lightship.errors import ConfigError\n"
        "from lightship.distributed import shared_memory\n"
        "shared_memory.check(1)\n"
        "try:\n    shared_memory.check(2)\n"
        "except ConfigError as error:\n    print(error)\n    sys.exit(error.exit_code)\n"
    )
    for size, expected in (("64m", 78), ("256m", 0)):
        flags = (f"--shm-size={size}", "--entrypoint=python")
        done = run(image, "-c", code, flags=flags)
        assert done.returncode == expected, done.stderr
        if expected:
            assert "/dev/shm has 64 MiB free; 2 GPUs on one node need 256 MiB" in done.stdout
            assert "--shm-size=256m" in done.stdout


def test_what_is_in_it(image: str, request) -> None:
    """Layers and the largest things are printed; nothing that only builds is there."""
    say(request, f"layers of {image}:")
    for line in podman("history", "--format", "{{.Size}}\t{{.CreatedBy}}", image).splitlines():
        size, _, made_by = line.partition("\t")
        if size != "0 B":
            say(request, f"  {size:>10}  {made_by[:100]}")
    script = (
        "cd /opt/venv/lib/python3*/site-packages; du -ks -- *; du -ks nvidia/*; du -ks /usr/*; "
        "du -ks /var 2> /dev/null || true"  # parts of it are root's own
    )
    sizes = [line.split("\t") for line in inside(image, "sh", "-c", script).splitlines()]
    largest = sorted(((int(kib), path) for kib, path in sizes if path != "nvidia"), reverse=True)
    say(request, "the largest 10 things in it:")
    for kib, path in largest[:10]:
        say(request, f"  {kib / 1024:8.0f} MiB  {path}")
    for program in ("pip", "gcc", "cc", "git", "curl", "uv"):
        found = inside(image, "sh", "-c", f"command -v {program} || true")
        assert not found, found
    code = (
        "import importlib.util as u\n"
        "print([n for n in ('pip', 'setuptools', 'wheel', 'ensurepip') if u.find_spec(n)])"
    )
    for python in ("/opt/venv/bin/python", "python3"):
        assert inside(image, python, "-c", code).strip() == "[]"
    # (Folders without files are left of what the test's own build mounts.)
    others = "find /opt -type f -not -path '/opt/venv/*' -not -path '/opt/lightship/*'"
    assert inside(image, "sh", "-c", others) == ""
    lists = "find /var/lib/apt/lists /build -type f 2>/dev/null || true"
    assert inside(image, "sh", "-c", lists) == ""


def test_its_python_is_compiled(image: str) -> None:
    """Torch's and ours, found without a time stamp's help, in a root that cannot be written."""
    code = (
        "import importlib.util as u, pathlib, torch, lightship.cli as c\n"
        "for m in (torch, c):\n"
        "    data = pathlib.Path(u.cache_from_source(m.__file__)).read_bytes()\n"
        "    print(int.from_bytes(data[4:8], 'little'))\n"
    )
    assert inside(image, "python", "-c", code).split() == ["1", "1"]  # checked by no one


def test_the_sbom_names_all_that_is_in_it(image: str) -> None:
    sbom = json.loads(inside(image, "cat", "/opt/venv/sbom.cdx.json"))
    assert sbom["bomFormat"] == "CycloneDX"
    listed = {
        (each["name"].lower().replace("_", "-"), each["version"]) for each in sbom["components"]
    }
    code = "import importlib.metadata as m\nfor d in m.distributions(): print(d.name, d.version)"
    for line in inside(image, "python", "-c", code).splitlines():
        name, version = line.lower().replace("_", "-").rsplit(" ", 1)
        if name != "lightship":
            assert (name, version) in listed, line
    version = inside(image, "python", "-c", "import platform as p; print(p.python_version())")
    assert ("cpython", version.strip()) in listed
    packages = inside(image, "dpkg-query", "--show", "--showformat=${Package} ${Version}\n")
    for line in packages.splitlines():
        assert tuple(line.split()) in listed, line


def test_labels_and_user(image: str) -> None:
    found = json.loads(podman("image", "inspect", image))[0]
    labels = found["Labels"]
    for name in ("title", "version", "revision", "licenses", "base.name"):
        assert labels[f"org.opencontainers.image.{name}"], name
    assert found["User"] == "10001:0"
    assert found["Config"]["Entrypoint"] == ["/usr/bin/tini", "--", "lightship"]
    assert set(found["Config"]["Volumes"]) == {"/workspace", "/cache", "/tmp"}
