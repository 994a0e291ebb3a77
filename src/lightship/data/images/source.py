"""Source: a file as Pillow decodes it, reduced to what its pixels need.

Pillow's parsers read whatever is in a file, in Python, entry by entry: comments, profiles, texts
and tables that are made to be many, or to overlap, take minutes or all memory. So each format's own
module leaves out what lies beside the pixels, and says what decoding will cost.
"""

from dataclasses import dataclass

MAX_PARTS = 65_536
"""Segments, blocks, entries, strips or tiles of a file; photographs have dozens."""


@dataclass(frozen=True)
class Source:
    """What Pillow is given.

    Attributes:
        kind: Pillow's name of the format.
        data: The file.
        width: As stored.
        height: As stored.
        bytes_per_pixel: Of memory, at most, from the first to the RGB pixels.
        orientation: See `orientation_of`; None: Pillow finds the metadata.
        more_bytes: Of memory, beside those of the pixels.
    """

    kind: str
    data: bytes | memoryview
    width: int
    height: int
    bytes_per_pixel: int
    orientation: int | None = 1
    more_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        """Of memory that decoding takes."""
        return self.width * self.height * self.bytes_per_pixel + self.more_bytes
