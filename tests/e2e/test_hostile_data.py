"""Data sets that attack, given to the commands: one line, the exit code of data, little memory."""

import gzip
import os
import pickle
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support import warm
from tests.support.images import cifar10, cifar_pixels, little_set, put, tarred

_MAX_GROWTH_KIB = 700 * 2**10
FILES = little_set(("train", "test"))


class _Forged:
    """An array whose state makes its bytes pointers."""

    def __reduce__(self) -> tuple:
        kind = _ForgedType()
        state = (1, (1, 3072), kind, False, b"A" * 3072 * 8)
        return np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), state


class _ForgedType:
    def __reduce__(self) -> tuple:
        return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)


def negative_size(folder: Path) -> str:
    data = bytearray(tarred(FILES))
    data[124:136] = b"\xff" * 10 + b"\xfe\x00"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return put(str(folder), {"x.tar": bytes(data)}) + "/x.tar"


def gzip_bomb(folder: Path) -> str:
    member = tarfile.TarInfo("a/x.png")
    member.size = 2**30
    packed = gzip.compress(member.tobuf()) + gzip.compress(bytes(2**20), 9) * 1024
    return put(str(folder), {"x.tar.gz": packed}) + "/x.tar.gz"


def forged_pickle(folder: Path) -> str:
    files = cifar10(cifar_pixels(10), cifar_pixels(10))
    files["cifar-10-batches-py/data_batch_1"] = pickle.dumps({"labels": [0], "data": _Forged()}, 2)
    return put(str(folder), files)


def sparse_image(folder: Path) -> str:
    put(str(folder), FILES)
    with (folder / "train/ant/000.png").open("r+b") as file:
        file.truncate(40 * 2**30)
    return str(folder)


def graph_of_links(folder: Path) -> str:
    put(str(folder), FILES)
    for i in range(40):
        (folder / f"train/ant/d{i}").mkdir()
        for side in "ab":
            (folder / f"train/ant/d{i}" / side).symlink_to(f"../d{i + 1}")
    put(str(folder), {"train/ant/d40/x.png": FILES["train/ant/000.png"]})
    return str(folder)


ATTACKS: dict[str, tuple[Callable[[Path], str], str]] = {
    "negative size": (negative_size, "the size -512; it must be 0 to 2^48"),
    "gzip bomb": (gzip_bomb, "unpacks from"),
    "forged pickle": (forged_pickle, "expected uint8"),
    "sparse image": (sparse_image, "42949672960 bytes, more than --data.max_sample_mib 1024"),
    "graph of links": (graph_of_links, "on more than 16 ways"),
}


def run(*command: str) -> tuple[int, str, int]:
    """(exit code, standard error, peak of resident KiB) of a lightship command."""
    with tempfile.TemporaryDirectory() as notes:
        done = subprocess.run(
            [warm.executable(), *command], env={**os.environ, warm.NOTES: notes},
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        return done.returncode, done.stderr, int(Path(notes, "peak_kib").read_text())


@pytest.mark.timeout(600)
def test_commands_end_in_a_line_and_the_code_of_data(tmp_path: Path) -> None:
    flags = ["--run.tracking=none", "--data.global_batch_size=4", "--trainer.max_epochs=1"]
    *_, usual_kib = run("fit", *flags, "--data.image_size_px=8", f"--run.output={tmp_path}/usual",
                        f"--data.root={put(str(tmp_path / 'set'), FILES)}")  # fmt: skip
    for name, (make, words) in ATTACKS.items():
        root, output = make(tmp_path / name), f"{tmp_path}/run of {name}"
        code, errors, peak_kib = run(
            "fit", *flags, "--data.image_size_px=8", f"--data.root={root}", f"--run.output={output}"
        )
        assert code == 65, (name, errors)
        (line,) = [text for text in errors.splitlines() if text.startswith("lightship: ")]
        assert words in line, name
        assert "Traceback" not in errors
        assert peak_kib < usual_kib + _MAX_GROWTH_KIB, name


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["negative size", "sparse image"])
def test_the_doctor_ends_too(tmp_path: Path, name: str) -> None:
    root = ATTACKS[name][0](tmp_path / "set")
    code, errors, peak_kib = run("doctor", f"--data.root={root}", f"--run.output={tmp_path}/run",
                                 "--run.tracking=none", "--data.image_size_px=16")  # fmt: skip
    assert code in (0, 78), errors  # 78: a check failed
    assert "Traceback" not in errors
    assert peak_kib < 3 * 2**20
