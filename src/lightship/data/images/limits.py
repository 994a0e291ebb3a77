"""Limits: what an image may cost to decode, and the settings that say so."""

from dataclasses import dataclass
from typing import Protocol

from lightship.config import DataConfig
from lightship.errors import DataError

_USUAL_SCANS = 16
"""So many are never too many; encoders write about 10."""
_MIN_SCAN_PIXELS = 4096
"""A scan of a smaller image counts as one of so many pixels."""


class _Settings(Protocol):
    max_image_pixels: int
    max_scan_pixels: int
    decode_gib: float


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost to decode.

    Attributes:
        pixels: Width times height. Above it a JPEG that is to be scaled down is decoded at a half,
            a quarter or an eighth of its size; anything else is refused, undecoded.
        scan_pixels: Width times height times scans of a JPEG of more than 16 scans.
        memory_bytes: Of all images that this process decodes at a time; see `memory.held`.
        flags: What the flags that set these begin with.
    """

    pixels: int = DataConfig.max_image_pixels
    scan_pixels: int = DataConfig.max_scan_pixels
    memory_bytes: int = int(DataConfig.decode_gib * 2**30)
    flags: str = "--data."

    @classmethod
    def of(cls, settings: _Settings, flags: str = "--data.") -> "ImageLimits":
        """As a section of the config sets them."""
        return cls(
            settings.max_image_pixels,
            settings.max_scan_pixels,
            int(settings.decode_gib * 2**30),
            flags,
        )

    def refuse_size(self, width: int, height: int, why: str = "") -> DataError:
        """What to raise for an image of this size."""
        return DataError(
            f"{width}x{height} px{why} are {width * height} pixels, more than "
            f"{self.flags}max_image_pixels {self.pixels}: raise it or remove the image"
        )

    def check_size(self, width: int, height: int) -> None:
        """Raise DataError for an image above the bound."""
        if width * height > self.pixels:
            raise self.refuse_size(width, height)

    def max_scans(self, width: int, height: int) -> int:
        """How many scans a JPEG of this size may have."""
        return max(_USUAL_SCANS, self.scan_pixels // max(width * height, _MIN_SCAN_PIXELS))

    def refuse_scans(self, width: int, height: int) -> DataError:
        """What to raise for a JPEG of more."""
        return DataError(
            f"{width}x{height} px in more than {self.max_scans(width, height)} scans are too many "
            f"for {self.flags}max_scan_pixels {self.scan_pixels}: raise it or remove the image"
        )


DEFAULT_LIMITS = ImageLimits()
