"""What can be said about the workflow without GitHub."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

from lightship import cli
from tests.support.pages import ROOT

WORKFLOW = ".github/workflows/ci.yml"


def jobs() -> dict:
    return yaml.safe_load((ROOT / WORKFLOW).read_text())["jobs"]


def commands() -> list[str]:
    return [step["run"] for job in jobs().values() for step in job["steps"] if "run" in step]


def test_it_fits_githubs_schema() -> None:
    linter = Path(sys.executable).with_name("check-jsonschema")
    command = [linter, "--builtin-schema", "vendor.github-workflows", WORKFLOW]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_runs_what_decides_here() -> None:
    assert ".ci/run" in commands()
    assert (ROOT / ".ci/run").stat().st_mode & 0o100


def test_it_builds_every_target_of_the_image() -> None:
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    stages = set(re.findall(r"^FROM \S+ AS (\w+)$", dockerfile, re.MULTILINE))
    last = {"cpu", "cuda", "xla"}
    assert set(jobs()["image"]["strategy"]["matrix"]["target"]) == last <= stages
    assert any(
        command.startswith("docker build --file docker/Dockerfile") for command in commands()
    )


def test_the_image_is_run_with_a_command_that_parses() -> None:
    [run] = [command for command in commands() if command.startswith("docker run")]
    command = cli.parse(run.partition(" lightship:cpu ")[2].split())
    assert command is not None
    assert command.name == "fit"


def test_hooks_before_a_commit_use_the_locked_tools() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    entries = [hook["entry"].split()[0] for repo in config["repos"] for hook in repo["hooks"]]
    assert [Path(entry).name for entry in entries] == ["ruff", "ruff", "mypy"]
    assert all(Path(sys.executable).with_name(Path(entry).name).exists() for entry in entries)
