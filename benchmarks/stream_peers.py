"""The peers' own environments, made on first use below build/peers, as each says.

The one thing they share is what this environment has installed (torch and torchvision: 5.7 GB): it
comes after the peer's own packages, so that pip adds what is missing or of another version.
"""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

ENVIRONMENTS = Path("build/peers")
REQUIREMENTS = {
    "webdataset": ["webdataset==1.0.2"],
    "litdata": ["litdata==0.2.76", "s3fs", "uvloop", "zstd"],  # those for its raw datasets
    "mosaicml-streaming": ["mosaicml-streaming==0.13.0"],
    "transformers": ["transformers", "accelerate"],
}
PHOTOGRAPHS = "scikit-image==0.26.0"


def python_of(peer: str) -> str:
    """The peer's interpreter, or this one for none; needs PyPI the first time."""
    if not peer:
        return sys.executable
    folder = ENVIRONMENTS.resolve() / peer
    python, done = folder / "bin" / "python", folder / "installed.json"
    wanted = json.dumps([REQUIREMENTS[peer], sys.version, sys.prefix])
    if not done.exists() or done.read_text() != wanted:
        print(f"  pip install {' '.join(REQUIREMENTS[peer])}", file=sys.stderr, flush=True)
        _do([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)])
        site = next(folder.glob("lib/python*/site-packages"))
        Path(site, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        _do([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS[peer]])
        done.write_text(wanted)
    return str(python)


def photographs() -> Path | None:
    """A folder with scikit-image's sample photographs; None without it and without PyPI."""
    folder = ENVIRONMENTS / "photographs"
    if not (folder / "skimage").exists():
        options = ["--quiet", "--no-deps", "--target", str(folder)]
        try:
            _do([sys.executable, "-m", "pip", "install", *options, PHOTOGRAPHS])
        except subprocess.CalledProcessError as error:
            print(f"  without the photographs of {PHOTOGRAPHS}: {error}", file=sys.stderr)
            return None
    return folder


def _do(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)
