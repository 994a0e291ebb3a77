"""A child's command line without secrets: any user of a machine may read the lists of processes."""

import json
import os
from collections.abc import Sequence

from lightship.redaction import learn, redact

_VARIABLE = "LIGHTSHIP_ARGUMENTS"


def hide(arguments: Sequence[str]) -> list[str]:
    """The arguments of the children of this process, redacted; `restore` gives those meant.

    A process's environment can be read by its own user only.
    """
    learn(*arguments)
    hidden = [redact(each) for each in arguments]
    if hidden != list(arguments):
        os.environ[_VARIABLE] = json.dumps(list(arguments))
    return hidden


def restore(arguments: list[str]) -> list[str]:
    """The arguments that a parent has hidden, else those given. Once, first in a process."""
    hidden = os.environ.pop(_VARIABLE, None)
    return arguments if hidden is None else json.loads(hidden)
