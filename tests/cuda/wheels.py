"""`make cuda-wheels`: the wheels of wheels.txt for Python 3.12 on Linux, with the lock's hashes."""

import re
import subprocess
import sys
from pathlib import Path

NAMES = Path(__file__).with_name("wheels.txt")
LOCK = Path("docker/locks/dev.lock")
FOLDER = Path("build/cuda/wheels")
MOST_BYTES = 64 * 2**20
_GLIBC = (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)
"""Minor versions of glibc 2 that manylinux wheels are built for, at most that machine's."""


def names() -> list[str]:
    lines = (line.strip() for line in NAMES.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def pins(lock: str) -> dict[str, str]:
    """Name -> its lines in a lock file: the version and the hashes."""
    blocks = re.findall(r"^([a-z0-9-]+)==.*(?:\n    --hash.*)*", lock, re.MULTILINE)
    texts = [match[0] for match in re.finditer(r"^[a-z0-9-]+==.*(?:\n    --hash.*)*", lock, re.M)]
    return dict(zip(blocks, texts, strict=True))


def main() -> None:
    locked = pins(LOCK.read_text())
    missing = [name for name in names() if name not in locked]
    assert not missing, f"{LOCK} has no {', '.join(missing)}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.iterdir():
        old.unlink()
    wanted = FOLDER.with_name("wheels.lock")
    wanted.write_text("\n".join(locked[name] for name in names()) + "\n")
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in _GLIBC]
    platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    subprocess.run(
        [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--require-hashes", "--only-binary=:all:", "--python-version=3.12",
            "--implementation=cp", *platforms, f"--dest={FOLDER}", f"--requirement={wanted}",
        ],
        check=True,
    )  # fmt: skip
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    total = sum(sizes.values())
    for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:5]:
        print(f"{size / 2**20:6.1f} MiB  {name}")
    print(f"{total / 2**20:6.1f} MiB  all {len(sizes)} wheels, in {FOLDER}")
    assert total < MOST_BYTES, "more than the 64 MiB that travel to the machine"


if __name__ == "__main__":
    main()
