"""The Kubernetes manifests as a cluster gets them: the files that stand alone, and each overlay."""

import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ALONE = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("k8s/*.yaml"))
OVERLAYS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("k8s/overlays/*"))


@functools.cache
def rendered(name: str) -> tuple[dict[str, Any], ...]:
    """The objects of a manifest or overlay, named by its path; do not change them."""
    path = ROOT / name
    if path.is_file():
        return tuple(yaml.safe_load_all(path.read_text()))
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: nothing here renders an overlay")
    text = subprocess.run(
        ["kubectl", "kustomize", str(path)], check=True, capture_output=True, text=True
    ).stdout
    return tuple(yaml.safe_load_all(text))


def of_kind(name: str, kind: str) -> list[dict[str, Any]]:
    """The objects of one kind of a manifest or overlay."""
    return [each for each in rendered(name) if each["kind"] == kind]


def pod_specs(name: str) -> list[dict[str, Any]]:
    """Every pod's spec in a manifest or overlay, whatever makes the pod."""
    specs = []
    for each in rendered(name):
        if each["kind"] == "Pod":
            specs.append(each["spec"])
        elif "template" in each.get("spec", {}):
            specs.append(each["spec"]["template"]["spec"])
        for part in each.get("spec", {}).get("replicatedJobs", ()):  # a JobSet
            specs.append(part["template"]["spec"]["template"]["spec"])
    return specs


def environment(container: dict[str, Any]) -> dict[str, str | None]:
    """A container's variables; None for what comes from elsewhere."""
    return {item["name"]: item.get("value") for item in container.get("env", ())}
