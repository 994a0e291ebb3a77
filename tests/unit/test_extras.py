"""The advice for a missing package installs what pyproject.toml names."""

import re
import shlex
import tomllib
from pathlib import Path

from lightship.extras import INSTALL

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_an_extra_is_installed_by_the_names_of_its_packages() -> None:
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    needed = {
        extra: [need if "==" in need else re.split("[<>=]", need)[0] for need in needs]
        for extra, needs in extras.items()
    }
    assert {extra: shlex.split(line)[2:] for extra, line in INSTALL.items()} == needed
