"""Web servers (http, https): read only, and trusted no further than the host that the user named.

A redirect stays on that host, unless `REDIRECTS` or a known service's own download hosts say
otherwise; it never leaves TLS. What a server sends is bounded by what was asked for.
"""
# ruff: noqa: D102 (see backend.Backend)

import asyncio
import ipaddress
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fsspec.asyn import sync

from lightship.errors import ConfigError
from lightship.storage.backend import PIECE_BYTES, Data, wrong_length
from lightship.storage.errors import Refused, WrongLength
from lightship.storage.fsspec_backend import Async
from lightship.storage.retry import Deadline, Limits
from lightship.storage.urls import redact

REDIRECTS = "LIGHTSHIP_HTTP_REDIRECTS"
"""Hosts that any server may redirect to, separated by commas; `*`: all public ones."""
_DOWNLOAD_HOSTS = {
    "huggingface.co": (".huggingface.co", ".hf.co"),
    "github.com": (".github.com", ".githubusercontent.com"),
}
_MAX_BYTES = 16 * 2**30
"""Of a file that is read whole into memory."""
_MAX_UNSIZED_BYTES = 2**30
"""The same, where the server does not say how long it is."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Web(Async):
    """All web servers.

    Args:
        kind: fsspec's class for http.
        options: For it.
        limits: Of its calls.
    """

    def __init__(self, kind: Any, options: dict[str, Any], limits: Limits) -> None:
        import aiohttp  # needed by no other storage

        timeout = aiohttp.ClientTimeout(None, None, limits.read_s, limits.connect_s)
        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(_check_redirect)
        options["client_kwargs"] = {"trust_env": True, "timeout": timeout, "trace_configs": [trace]}
        options["headers"] = {"Accept-Encoding": "identity"}  # ranges count plain bytes
        super().__init__(kind(**options), is_read_only=True)

    def get(self, deadline: Deadline, path: str, start: int, end: int | None) -> Data:
        left_s = None if end is None else max(deadline.left_s(), 1e-3)  # a whole file: `_parts`
        return sync(self.fs.loop, self._get, deadline, path, start, end, timeout=left_s)

    async def _get(self, deadline: Deadline, url: str, start: int, end: int | None) -> bytes:
        if start == end:
            return b""
        headers = {}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        async with self._answer(url, headers) as answer:
            size = None if "Content-Encoding" in answer.headers else answer.content_length
            if headers and answer.status != 206 and (start or size is None or size != end):
                if end is None or size is None:
                    raise ConfigError(f"{redact(url)}: the server sends no ranges; download it")
                raise wrong_length(url, size, start, end, size)
            most = _MAX_UNSIZED_BYTES if size is None else _MAX_BYTES
            if (size or 0) > most:
                raise Refused(f"{redact(url)} has {size} bytes, too many to be read whole")
            parts, count = [], 0
            async for part in _parts(deadline, answer):
                parts.append(part)
                count += len(part)
                if count > PIECE_BYTES:
                    deadline.progress()
                if end is not None and count > end - start:
                    break  # too long, which `read` reports
                if count > most:
                    raise Refused(f"{redact(url)} sends {count} bytes and does not end")
            return b"".join(parts)

    def get_file(self, deadline: Deadline, path: str, to_path: Path) -> None:
        sync(self.fs.loop, self._download, deadline, path, to_path, self.size(deadline, path))

    async def _download(self, deadline: Deadline, url: str, to_path: Path, size: int) -> None:
        count = 0
        async with self._answer(url, {}) as answer:
            with to_path.open("wb") as out:
                async for part in _parts(deadline, answer):
                    out.write(part)
                    count += len(part)
                    deadline.progress()
                    if count > size:
                        break
        if count != size:
            raise WrongLength(f"{count} bytes or more came of a file of {size} bytes")

    @asynccontextmanager
    async def _answer(self, url: str, headers: dict[str, str]) -> AsyncIterator[Any]:
        session = await self.fs.set_session()
        request = {**self.fs.kwargs, "headers": {**self.fs.kwargs.get("headers", {}), **headers}}
        async with session.get(self.fs.encode_url(url), **request) as answer:
            if answer.status == 404:
                raise FileNotFoundError(url)
            answer.raise_for_status()
            yield answer


async def _parts(deadline: Deadline, answer: Any) -> AsyncIterator[bytes]:
    """The parts of an answer as they come. Raises OSError if they come in a trickle."""
    began_s, count = time.monotonic(), 0
    async for part in answer.content.iter_any():
        count += len(part)
        may_take_s = deadline.total_s + count / deadline.limits.slowest_bytes_per_s
        if time.monotonic() - began_s > may_take_s:
            raise OSError(f"only {count} bytes came in {may_take_s:.0f} s")
        yield part


async def _check_redirect(session: Any, context: Any, redirect: Any) -> None:
    """Raise Refused before aiohttp follows a redirect that it must not."""
    answer = redirect.response
    location = answer.headers.get("Location") or answer.headers.get("URI")
    if location is None:
        return
    try:
        target = redirect.url.join(type(redirect.url)(location))
    except ValueError:
        return  # which aiohttp reports
    if why := await _why_refused(redirect.url, target):
        answer.close()
        raise Refused(f"{redact(str(redirect.url))} redirects to {redact(str(target))}, {why}")


async def _why_refused(url: Any, target: Any) -> str:
    """Why a redirect from `url` to `target` is not followed, in words; "" if it is."""
    if target.scheme not in ("http", "https"):
        return "which is no web address"
    if url.scheme == "https" and target.scheme != "https":
        return "without TLS"
    host, before = target.host or "", url.host or ""
    is_same_port = target.port == url.port or (url.port, target.port) == (80, 443)
    if host.removeprefix("www.") == before.removeprefix("www.") and is_same_port:
        return ""
    allowed = [item.strip() for item in os.environ.get(REDIRECTS, "").split(",")]
    if {host, f"{host}:{target.port}"} & set(allowed):
        return ""
    if "*" not in allowed and not f".{host}".endswith(_DOWNLOAD_HOSTS.get(before, ("/",))):
        return f"another host; {REDIRECTS}={host} allows it"
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return ""  # which aiohttp reports
    inner = [str(info[4][0]) for info in found if not _is_public(str(info[4][0]))]
    return f"at {inner[0]} in a private network; {REDIRECTS}={host} allows it" if inner else ""


def _is_public(address: str) -> bool:
    """Whether an address belongs to the internet, not to this machine, its network or its cloud."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.ipv4_mapped
        return inner.is_global if inner else ip.is_global
    return ip.is_global
