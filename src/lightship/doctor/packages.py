"""Whether Python and its packages fit together, and can be imported."""

import re
import sys
from importlib import metadata

from lightship.doctor.checks import Finding
from lightship.doctor.context import Context

_OLDEST_PYTHON = (3, 11)


def packages(context: Context) -> Finding:
    """Python's version, and whether torchvision was built for the torch beside it."""
    named = ("torch", "torchvision", "lightning")
    found = {name: next(iter(metadata.distributions(name=name)), None) for name in named}
    versions = {name: package.version for name, package in found.items() if package}
    if missing := [name for name in named if name not in versions]:
        fix = "install lightship again in this environment: pip install . in its checkout"
        return Finding("fail", f"no package {', '.join(missing)}", "fit cannot start", fix)
    seen = f"Python {sys.version.split()[0]}" + "".join(f", {n} {v}" for n, v in versions.items())
    if sys.version_info < _OLDEST_PYTHON:
        means = "lightship does not support this Python"
        return Finding("fail", seen, means, "install Python 3.11 or newer")
    needs = [need for need in metadata.requires("torchvision") or [] if re.match(r"torch\b", need)]
    if wanted := re.search(r"([=>~]=) *(\d+\.\d+)", needs[0] if needs else ""):
        have, want = major_minor(versions["torch"]), major_minor(wanted[2])
        if have < want or (wanted[1] == "==" and have != want):
            return Finding(
                "fail",
                seen,
                f"torchvision was built for torch {wanted[2]}: its operators fail to load",
                f"pip install 'torch=={wanted[2]}.*' 'torchvision=={versions['torchvision']}', "
                "both from the same index",
            )
    return Finding("ok", seen, "compatible versions")


def imports(context: Context) -> Finding:
    """Whether all that a fit needs can be imported."""
    context.loaded.result()
    return Finding("ok", "all modules of a fit", "they import without errors")


def major_minor(version: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    numbers = [int(part) for part in re.findall(r"\d+", version)[:2]]
    return numbers[0], numbers[1] if len(numbers) > 1 else 0
