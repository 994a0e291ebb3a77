"""URLs: what a path, a URL or a chain of them means, without touching the storage behind it."""

import os
import re
from pathlib import Path

from lightship.errors import ConfigError

_SECRET_SETTING = re.compile(
    r"(?i)\b(\w*(?:secret|password|token|signature|credential|authorization|api[_-]?key|"
    r"access[_-]?key(?:[_-]?id)?)['\"]?\s*[=:]\s*['\"]?)(?:(?:bearer|basic)\s+)?[^\s,;&'\"]+"
)
_NEXT_LINK = re.compile(r"::(?=\w+://|(?:zip|tar|libarchive)::)")
_IN_ARCHIVE = re.compile(r"(?:zip|tar|libarchive)(?:://|::)")
_SECRET_VARIABLES = re.compile(r"SECRET|TOKEN|PASSWORD|API_KEY|ACCESS_KEY")


def split(url: str) -> tuple[str, str, str | None]:
    """(protocol, first link with its protocol, rest of the chain or None) of a URL.

    A `::` chains where another URL follows it, or an archive's path precedes it; elsewhere it is a
    part of a name (data::v2, s3://bucket/a::b/0.png).
    """
    link = _NEXT_LINK.search(url)
    at = link.start() if link else url.rfind("::") if _IN_ARCHIVE.match(url) else -1
    head, rest = url[:at], url[at + 2 :]
    if at > 0 and ("://" in head or head.isalnum()):
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


def relative_to(url: str, root: str) -> str | None:
    """The path of `url` below `root`, "" for the root itself; None where it is not below it."""
    if is_remote(url) or is_remote(root):
        path = f"{url.rstrip('/')}/".removeprefix(f"{root.rstrip('/')}/")
        return None if path == f"{url.rstrip('/')}/" else path.rstrip("/")
    here, there = local_path(url).resolve(), local_path(root).resolve()
    if not here.is_relative_to(there):
        return None
    return here.relative_to(there).as_posix() if here != there else ""


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


def cache_path(*parts: str) -> Path:
    """`parts` under $LIGHTSHIP_CACHE, $XDG_CACHE_HOME/lightship or ~/.cache/lightship."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = os.environ.get("LIGHTSHIP_CACHE") or f"{home}/lightship"
    return Path(cache).expanduser().joinpath(*parts)
