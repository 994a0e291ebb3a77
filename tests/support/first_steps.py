"""What every command does first and always the same, done when this is imported: a fork has it."""

import docstring_parser  # noqa: F401
import jinja2  # noqa: F401
from PIL import Image

from lightship.cli.parser import COMMANDS, build_parser

Image.preinit()  # its readers of the common formats
for _name in COMMANDS.keys() - {"pack"}:
    build_parser(_name)
