"""URLs: what a path, a URL or a chain of them means, without touching the storage behind it."""

import os
import re
from pathlib import Path

from lightship.exits import ConfigError

_SECRET_SETTING = re.compile(
    r"(?i)\b(\w*(?:secret|password|token|signature|credential|authorization|api[_-]?key|"
    r"access[_-]?key(?:[_-]?id)?)['\"]?\s*[=:]\s*['\"]?)(?:(?:bearer|basic)\s+)?[^\s,;&'\"]+"
)
_SECRET_VARIABLES = re.compile(r"SECRET|TOKEN|PASSWORD|API_KEY|ACCESS_KEY")


def split(url: str) -> tuple[str, str, str | None]:
    """(protocol, first link with its protocol, rest of the chain or None) of a URL."""
    head, chained, rest = url.partition("::")
    if chained and ("://" in head or head.isalnum()):
        head = head if "://" in head else head + "://"
        return head.partition("://")[0], head, rest
    protocol, is_url, _ = url.partition("://")
    return (protocol if is_url else "file"), url, None


def join(url: str, *parts: str) -> str:
    """`parts` under `url`; in a chain, inside its first link (zip://HERE::s3://b/x.zip)."""
    parts = tuple(part.strip("/") for part in parts if part.strip("/"))
    if not parts:
        return url
    _, head, rest = split(url)
    protocol, is_url, path = head.rpartition("://")
    joined = "/".join((path.rstrip("/"), *parts)) if path else "/".join(parts)
    return protocol + is_url + joined + ("" if rest is None else f"::{rest}")


def base_name(url: str) -> str:
    """The last part of the path; of an archive's root, the archive's."""
    protocol, head, rest = split(url)
    path = head.rpartition("://")[2].strip("/")
    if rest is not None and not path:
        return base_name(rest)
    if protocol in ("http", "https"):
        path = path.partition("?")[0].partition("#")[0].rstrip("/")
    return path.rpartition("/")[2]


def is_remote(url: str) -> bool:
    """Whether `url` is anything but a path on this machine (`local_path` then raises)."""
    protocol, _, rest = split(url)
    return rest is not None or protocol not in ("file", "local")


def is_private(url: str) -> bool:
    """Whether what is there can be seen by this process alone (memory://)."""
    protocol, _, rest = split(url)
    return protocol == "memory" or (rest is not None and is_private(rest))


def local_path(url: str) -> Path:
    """The path that a path or a file:// URL means. Raises ConfigError for a remote one."""
    if is_remote(url):
        raise ConfigError(f"{redact(url)} is not a path on this machine, which is needed here")
    return Path(url.partition("://")[2] or url).expanduser()


def redact(text: str) -> str:
    """`text` without credentials: users and queries of URLs, keys, secrets of the environment."""
    text = re.sub(r"(?<=://)[^/\s'\"@]+@", "***@", text)
    text = re.sub(r"(\w://[^\s'\"?]*)\?[^\s'\"]*", r"\1?***", text)
    text = re.sub(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b", "***", text)
    text = _SECRET_SETTING.sub(r"\1***", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and not value.startswith("/") and _SECRET_VARIABLES.search(name):
            text = text.replace(value, "***")
    return text
