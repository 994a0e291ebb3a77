"""Protocols: the fsspec file system behind each, and what to install for it."""

from typing import Any

from fsspec.registry import get_filesystem_class

from lightship.errors import ConfigError
from lightship.storage.urls import redact

_EXTRAS = {"gs": "gcs", "gcs": "gcs", "hf": "hf"}


def file_system_class(protocol: str, url: str) -> Any:
    """fsspec's class for a protocol. Raises ConfigError without one, or without its package."""
    try:
        return get_filesystem_class(protocol)
    except ValueError as error:
        raise ConfigError(
            f"{redact(url)}: '{protocol}://' is no known storage; use a path, s3://, gs://, hf://, "
            "https:// or another protocol of fsspec"
        ) from error
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        need = f"pip install 'lightship[{extra}]'" if extra else str(error)
        raise ConfigError(f"{redact(url)}: '{protocol}://' needs a package: {need}") from error
