"""Where Weights & Biases writes: its own folders if they are writable, else temporary ones."""

import os
import tempfile
from pathlib import Path
from shutil import rmtree

_WRITTEN = {
    "WANDB_CACHE_DIR": ("XDG_CACHE_HOME", "~/.cache"),
    "WANDB_DATA_DIR": ("XDG_DATA_HOME", "~/.local/share"),
}
"""Variable of a folder -> the variable and the path of its parent by default."""


class WandbFolders:
    """Sets W&B's variables to writable folders. Create it before W&B is imported.

    The user's or W&B's default folders are kept if they are writable.

    Args:
        scratch_path: A local folder for the run's files.
    """

    def __init__(self, scratch_path: Path) -> None:
        self._scratch_path = scratch_path
        self._made_path: Path | None = None
        for name, (variable, default) in _WRITTEN.items():
            base = os.environ.get(variable) or default
            if not is_writable(Path(os.environ.get(name) or Path(base, "wandb"))):
                self._replace(name)
        if not is_writable(Path(os.environ.get("WANDB_ARTIFACT_DIR") or "artifacts")):
            self._replace("WANDB_ARTIFACT_DIR")
        config_path = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb")
        if not _is_readable(config_path / "settings"):
            self._replace("WANDB_CONFIG_DIR")

    @property
    def root_path(self) -> Path:
        """The folder of the run's files: WANDB_DIR if it is writable, else the scratch path."""
        wished = os.environ.get("WANDB_DIR")
        return Path(wished) if wished and is_writable(Path(wished)) else self._scratch_path

    def remove(self) -> None:
        """Remove the temporary folders."""
        if self._made_path is not None:
            rmtree(self._made_path, ignore_errors=True)

    def _replace(self, name: str) -> None:
        if self._made_path is None:
            try:
                self._made_path = Path(tempfile.mkdtemp(prefix="lightship-wandb-"))
            except OSError:  # there is no temporary folder
                self._made_path = Path(tempfile.mkdtemp(prefix=".wandb-", dir=self._scratch_path))
        path = self._made_path / name.lower()
        path.mkdir()
        os.environ[name] = str(path)


def is_writable(path: Path) -> bool:
    """Whether a folder exists or can be created, and is writable. Leaves no file behind."""
    try:
        path = path.expanduser().absolute()
        there = next(each for each in (path, *path.parents) if os.path.lexists(each))
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b".")
    except (OSError, RuntimeError, ValueError):  # no home; a NUL in the path
        return False
    return True


def _is_readable(path: Path) -> bool:
    """Whether a file is readable or does not exist."""
    try:
        path.expanduser().open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, RuntimeError, ValueError):
        return False
    return True
