"""URLs: what a path, a URL or a chain of them means, without touching the storage behind it."""

import os
import re
from pathlib import Path

from lightship.errors import ConfigError
from lightship.redaction import is_redacted, redact

_NEXT_LINK = re.compile(r"::(?=\w+://|(?:zip|tar|libarchive)::)")
_IN_ARCHIVE = re.compile(r"(?:zip|tar|libarchive)(?:://|::)")


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
    if protocol in ("http", "https") or is_redacted(redact(url)):
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


def stays_below(url: str, path: str) -> bool:
    """Whether `join(url, path)` is the file of that name below `url`.

    It is not above it, nor, by a `::`, another URL, nor the file without a slash at either end,
    which `join` leaves out.
    """
    if path.startswith("/") or path.endswith("/"):
        return False
    if ".." in path and ".." in path.split("/"):
        return False
    if "::" not in path:
        return True
    protocol, _, rest = split(join(url, path))
    return (protocol, rest) == (split(url)[0], split(url)[2])


def stays_inside(path: str) -> bool:
    """Whether `stays_below(url, path)` for every `url`: for names whose root is not known yet."""
    return stays_below("zip://::x.zip", path)  # here any link that `path` may begin is one


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


def cache_path(*parts: str) -> Path:
    """`parts` under $LIGHTSHIP_CACHE, $XDG_CACHE_HOME/lightship or ~/.cache/lightship."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = os.environ.get("LIGHTSHIP_CACHE") or f"{home}/lightship"
    return Path(cache).expanduser().joinpath(*parts)
