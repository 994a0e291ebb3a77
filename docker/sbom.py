"""Adds Python and the Debian packages of this system to a CycloneDX SBOM of its Python packages."""

import json
import platform
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote


def main() -> None:
    """Rewrite the SBOM named on the command line."""
    path = Path(sys.argv[1])
    sbom = json.loads(path.read_text())
    python = platform.python_version()
    purl = f"pkg:generic/cpython@{python}"
    cpe = f"cpe:2.3:a:python:python:{python}:*:*:*:*:*:*:*"
    sbom["components"].append(
        {"type": "platform", "bom-ref": purl, "name": "cpython", "version": python, "cpe": cpe,
         "purl": purl}
    )  # fmt: skip
    shown = "${Package} ${Version} ${Architecture}\n"
    listed = subprocess.run(
        ["dpkg-query", "--show", f"--showformat={shown}"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for line in sorted(listed.splitlines()):
        name, version, architecture = line.split()
        purl = f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={architecture}"
        sbom["components"].append(
            {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
        )
    path.write_text(json.dumps(sbom, indent=1))


if __name__ == "__main__":
    main()
