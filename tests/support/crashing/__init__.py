"""A decoder that crashes, in the data worker: an image that ends in CRASH ends its process.

`sitecustomize.py` here is run at the start of every Python with this folder in PYTHONPATH. A real
crash of the decoders cannot be had: they die of no image that we know.
"""

from pathlib import Path

CRASH = b"crash:SIGSEGV"
"""May follow the end of a PNG, which stays readable. Any signal may be named."""
FOLDER = str(Path(__file__).parent)
"""The PYTHONPATH of who starts the worker."""
