"""The pages of the documentation, cut into what a reader would type, save or run."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)
_SHELL = ("", "sh", "bash", "shell", "console")
_NAMED = re.compile(r"# ([\w-]+\.\w+)\n")


@dataclass(frozen=True)
class Example:
    """One thing to do.

    Attributes:
        page: Where it stands, from the root.
        line: Its line there.
        kind: `command` (one line of a shell), or the language of a fenced block.
        text: The command, or the whole block.
    """

    page: str
    line: int
    kind: str
    text: str

    @property
    def file(self) -> str:
        """The name that the block's first line says to save it under, or ''."""
        named = _NAMED.match(self.text) if self.kind != "command" else None
        return named[1] if named else ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {' '.join(self.text.split())[:70]}"


def examples_of(page: str, text: str) -> list[Example]:
    """A page's examples in order: each line of an indented or shell block, each other block."""
    found = []
    for fence in _FENCE.finditer(text):
        line = text.count("\n", 0, fence.start()) + 2
        if fence[1] in _SHELL:
            found += _commands(page, line, fence[2])
        else:
            found.append(Example(page, line, fence[1], fence[2]))
    without = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    for block in _INDENTED.finditer(without):
        found += _commands(page, without.count("\n", 0, block.start()) + 1, block[0])
    return sorted(found, key=lambda example: example.line)


def _commands(page: str, first: int, block: str) -> list[Example]:
    commands, begun, at = [], "", first
    for number, line in enumerate(block.splitlines(), first):
        words = line.strip().removeprefix("$ ")
        if not begun:
            at = number
        if words.endswith("\\"):
            begun += words.removesuffix("\\")
        elif begun or (words and not words.startswith("#")):
            commands.append(Example(page, at, "command", begun + words))
            begun = ""
    return commands


def all_examples() -> list[Example]:
    """The examples of every page, README.md first."""
    return [each for page in PAGES for each in examples_of(page, (ROOT / page).read_text())]
