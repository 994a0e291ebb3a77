"""A latency proxy: HTTP passes through it unchanged, the first byte of each response later.

It looks at no more than the first bytes of what passes, so that its own CPU cost stays small.
"""

import asyncio
import threading
from typing import Any
from urllib.parse import urlsplit

_METHODS = (b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")


class LatencyProxy:
    """`with LatencyProxy(endpoint, 0.02) as proxy: ...`; then use proxy.endpoint.

    `requests` counts what arrived, `sent_bytes` what went back, headers too. One response has to
    begin before the next request of a connection comes, as is so with all clients of S3.
    """

    def __init__(self, upstream: str, delay_s: float):
        where = urlsplit(upstream)
        self.upstream, self.delay_s = (where.hostname, where.port), delay_s
        self.requests, self.sent_bytes = 0, 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> "LatencyProxy":
        self.thread.start()
        listening = self.loop.create_server(lambda: _Client(self), "127.0.0.1", 0, backlog=1024)
        self.server = asyncio.run_coroutine_threadsafe(listening, self.loop).result(timeout=10)
        self.endpoint = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.server.close)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(timeout=10)


class _Side(asyncio.Protocol):
    """One end of a connection through the proxy; what it cannot send yet, the other holds back."""

    other: "_Side"
    transport: Any = None
    held = b""

    def pause_writing(self) -> None:
        if self.other.transport:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other.transport and not self.other.held:
            self.other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        if self.other.transport:
            self.other.transport.close()  # after what it has still to send


class _Client(_Side):
    def __init__(self, proxy: LatencyProxy):
        self.proxy, self.other = proxy, _Upstream(proxy, self)
        self.waits = False  # for the first byte of a response
        self.early = b""  # what came before there was a connection to pass it on to

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        connecting = self.proxy.loop.create_connection(lambda: self.other, *self.proxy.upstream)
        self.connecting = self.proxy.loop.create_task(connecting)
        self.connecting.add_done_callback(self._connected)

    def _connected(self, done: asyncio.Task) -> None:
        if done.exception():
            self.transport.abort()
        elif self.transport.is_closing():
            self.other.transport.close()

    def data_received(self, data: bytes) -> None:
        if not self.waits and data.startswith(_METHODS):
            self.proxy.requests += 1
            self.waits = True
        if self.other.transport:
            self.other.transport.write(data)
        else:
            self.early += data


class _Upstream(_Side):
    def __init__(self, proxy: LatencyProxy, client: _Client):
        self.proxy, self.other, self.client = proxy, client, client

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self.client.early)

    def data_received(self, data: bytes) -> None:
        self.proxy.sent_bytes += len(data)
        if self.client.waits and not data.startswith(b"HTTP/1.1 100"):
            self.client.waits = False
            self.held = data
            self.transport.pause_reading()
            self.proxy.loop.call_later(self.proxy.delay_s, self._release)
        else:
            self.client.transport.write(data)

    def _release(self) -> None:
        self.client.transport.write(self.held)
        self.held = b""
        self.transport.resume_reading()
