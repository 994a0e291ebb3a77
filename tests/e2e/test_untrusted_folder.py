"""Commands that stand in a folder from elsewhere: no code of that folder runs.

The folder holds the images and, for every module that Python, the libraries or lightship import or
look for, a file of that name that leaves a mark when it is imported; and a libcuda.so.1.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.images import little_set, put

LIGHTSHIP = [str(Path(sys.executable).parent / "lightship")]
BOUND_S = 240
FIT = [
    "fit", "--data.root=.", "--model.net=litcnn", "--data.global_batch_size=6",
    "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
]  # fmt: skip
COMMANDS = {
    "resident": [*FIT, "--run.output=runs/1", "--data.mode=resident", "--run.tracking=offline"],
    "streaming": [*FIT, "--run.output=runs/2", "--data.mode=streaming"],
    "two processes": [
        *FIT, "--run.output=runs/3", "--data.mode=streaming", "--trainer.devices=2",
        "--model.net=my_own_net:build",
    ],
    "predict": ["predict", "--run.output=runs/1", "--data.root=.", "--predictions=out.csv"],
    "pack": ["pack", ".", "../packed"],
    "doctor": ["doctor", *FIT[1:], "--trainer.devices=2"],
}  # fmt: skip
_RECORD = """
import json, os, sys

class Recorder:
    names = set(sys.modules)
    def find_spec(name, path=None, target=None):
        Recorder.names.add(name)

sys.meta_path.insert(0, Recorder)
from lightship import cli
for arguments in json.loads(sys.argv[1]):
    cli.main(arguments)
os.write(3, json.dumps(sorted({name.partition(".")[0] for name in Recorder.names})).encode())
"""
_NET = """
from torch import nn

def build(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))
"""
_IMAGES = little_set(size_px=(16, 16))


def run(command: list[str], folder: Path, **how: object) -> "subprocess.CompletedProcess[str]":
    given = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return subprocess.run(
        command, cwd=folder, env={**given, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
        capture_output=True, text=True, timeout=BOUND_S, **how,
    )  # fmt: skip


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Top-level modules that can be imported here, or that a fit and the doctor look for."""
    folder = Path(put(str(tmp_path_factory.mktemp("clean") / "images"), _IMAGES))
    read, write = os.pipe()
    commands = json.dumps([COMMANDS["streaming"], COMMANDS["doctor"]])
    script = f"import os; os.dup2({write}, 3)\n{_RECORD}"
    run([sys.executable, "-P", "-c", script, commands], folder, pass_fds=[write])
    os.close(write)
    with os.fdopen(read) as pipe:
        found = set(json.loads(pipe.read()))
    installed = set(importlib.metadata.packages_distributions())
    names = {*found, *installed, *sys.stdlib_module_names, "sitecustomize", "usercustomize"}
    assert names >= {"random", "glob", "torch", "numpy", "wandb", "lightship", "lightning"}
    return {name for name in names if name.isidentifier()}


_LIBRARY = """
#include <fcntl.h>
#include <unistd.h>
__attribute__((constructor)) static void leave(void) {
    int file = open(MARK, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (write(file, "libcuda ", 8)) close(file);
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, imported: set[str]) -> Path:
    folder = Path(put(str(tmp_path_factory.mktemp("untrusted") / "images"), _IMAGES))
    (folder / "my_own_net.py").write_text(_NET)
    plant(folder, imported)
    if compiler := shutil.which("cc") or shutil.which("gcc"):
        mark, out = f'-DMARK="{folder / "mark"}"', folder / "libcuda.so.1"
        command = [compiler, "-shared", "-fPIC", "-x", "c", mark, "-o", str(out), "-"]
        subprocess.run(command, input=_LIBRARY, text=True, check=True)
    return folder


def plant(folder: Path, names: set[str]) -> None:
    for name in names:
        mark = f"open({str(folder / 'mark')!r}, 'ab', buffering=0).write(b'{name} ')\n"
        (folder / f"{name}.py").write_text(mark)


def marks(folder: Path) -> str:
    path = folder / "mark"
    return path.read_text() if path.exists() else ""


def test_a_mark_is_left_where_the_folder_is_imported_from(folder: Path) -> None:
    run([sys.executable, "-c", "import glob"], folder)
    assert "glob" in marks(folder).split()
    (folder / "mark").unlink()


def test_torch_alone_loads_a_library_of_the_working_directory(folder: Path) -> None:
    """Some of its builds do: those with a libcusparseLt that looks for its driver there."""
    run([sys.executable, "-P", "-c", "import torch"], folder)
    if marks(folder) == "":
        pytest.skip("this torch does not, or there is no compiler")
    assert set(marks(folder).split()) == {"libcuda"}
    (folder / "mark").unlink()


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_imported_from_the_working_directory(folder: Path, name: str) -> None:
    ended = run([*LIGHTSHIP, *COMMANDS[name]], folder)
    assert marks(folder) == ""
    if name == "doctor":  # for which the folder holds few images among many files
        assert "fit accepts it" in ended.stdout
        return
    assert ended.returncode == 0, ended.stdout + ended.stderr
    if name == "two processes":  # asked for, and said
        assert f"my_own_net:build: imported {folder / 'my_own_net.py'}" in ended.stderr


def test_python_m(tmp_path: Path, imported: set[str]) -> None:
    """What Python itself imports before lightship begins is beyond it: docs/security.md."""
    folder = Path(put(str(tmp_path / "images"), _IMAGES))
    (folder / "__main__probe.py").write_text("import json, sys; print(json.dumps([*sys.modules]))")
    before = json.loads(run([sys.executable, "-m", "__main__probe"], folder).stdout)
    plant(folder, imported - set(before) - {"lightship"})
    ended = run([sys.executable, "-m", "lightship", *COMMANDS["streaming"]], folder)
    assert marks(folder) == ""
    assert ended.returncode == 0, ended.stdout + ended.stderr
