"""Settings of S3's clients that would only show as a hang, a panic or a failure of each try."""

import os
from typing import Any
from urllib.parse import urlsplit

from lightship.errors import ConfigError
from lightship.storage.urls import redact

_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
"""Those of a Secret often end with a line break, as `echo KEY | base64` makes it."""


def check_settings(fs: Any) -> None:
    """Raise ConfigError for an endpoint, a key or a certificate file that cannot be one.

    Args:
        fs: The file system of s3fs, which has the settings of FSSPEC_S3_*.
    """
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    endpoints = {name: os.environ.get(name) for name in names} | {
        "FSSPEC_S3_ENDPOINT_URL": fs.endpoint_url,
        "FSSPEC_S3_CLIENT_KWARGS: endpoint_url": fs.client_kwargs.get("endpoint_url"),
    }
    for name, url in endpoints.items():
        if url and not _is_endpoint(url):
            raise ConfigError(
                f"{name} is '{redact(url)}'; it must be http://HOST:PORT or https://HOST"
            )
    for name in _KEYS:
        key = os.environ.get(name, "")
        if key != key.strip() or not key.isprintable():
            raise ConfigError(f"{name} contains a line break, or begins or ends with a space")
    bundle = os.environ.get("AWS_CA_BUNDLE")
    if bundle and not os.access(bundle, os.R_OK):
        raise ConfigError(f"AWS_CA_BUNDLE is '{bundle}', which is no file that can be read")


def _is_endpoint(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, an unfinished [IPv6]
        return False
