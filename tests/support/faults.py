"""A fault proxy: stands before an HTTP server, counts its requests, and breaks those it is told to.

Faults: "status" (an error answer), "reset" (half of the body, then a TCP reset), "stall" (half of
the body, then silence), "short" and "long" (a body one byte off, with headers that agree with it),
"flip" (a body of the right length with one wrong bit), "flip told" (beside the server's check sum),
"slow" (every answer `SLOW_S` late), "trickle" (a body at `TRICKLE_BYTES_PER_S`), "hour ahead" (by
the server's clock it is an hour later), "deaf" (a request's body is neither asked for nor taken).
"""

import collections
import http.client
import math
import os
import socket
import struct
import sys
import threading
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

SLOW_S = 1.0
TRICKLE_BYTES_PER_S = 4 * 2**20
_HOP_HEADERS = ("connection", "transfer-encoding", "content-length", "keep-alive", "expect")


class FaultProxy:
    """`with FaultProxy(endpoint) as proxy: proxy.plan("reset", times=2)`; then use proxy.endpoint.

    `requests` counts by method what arrived, broken or not; the listings of S3, which are GETs, as
    LIST.
    """

    def __init__(self, upstream: str):
        self.upstream, self.requests = urlsplit(upstream), collections.Counter[str]()
        self.turn, self.closing = threading.Lock(), threading.Event()
        self.clear()

    def plan(
        self,
        fault: str,
        times: float = math.inf,
        methods: tuple[str, ...] = ("GET",),
        status: int = 503,
        code: str = "SlowDown",
        after: int = 0,
        path: str = "",
    ) -> None:
        """Breaks `times` requests of these methods after so many good ones; counts start anew.

        Those alone whose path holds `path`.
        """
        self.clear()
        self.after, self.path = after, path
        self.fault, self.times, self.methods = fault, times, methods
        self.status, self.code = status, code

    def clear(self) -> None:
        """No faults from here on; the requests' count starts anew."""
        self.fault, self.times, self.after, self.path = "", 0.0, 0, ""
        self.methods: tuple[str, ...] = ()
        self.requests.clear()

    def take_fault(self, method: str, path: str = "") -> str:
        """Counts a request and says how to break it; empty: not at all."""
        with self.turn:
            self.requests["LIST" if "list-type=2" in path else method] += 1
            if method not in self.methods or self.times < 1 or self.path not in path:
                return ""
            if self.after > 0:
                self.after -= 1
                return ""
            self.times -= 1
            return self.fault

    def __enter__(self) -> "FaultProxy":
        handler = type("Handler", (_Handler,), {"proxy": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients that gave up are no news
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def handle_expect_100(self) -> bool:
        is_deaf = self.proxy.fault == "deaf" and self.proxy.times >= 1
        return is_deaf or super().handle_expect_100()

    def do_GET(self) -> None:
        proxy = self.proxy
        fault = proxy.take_fault(self.command, self.path)
        if fault == "deaf":
            self.close_connection = True
            proxy.closing.wait()
            return
        body = self._request_body()
        if fault == "status":
            text = (
                f"<Error><Code>{proxy.code}</Code><Message>broken here</Message></Error>".encode()
            )
            self._answer(proxy.status, [("Content-Type", "application/xml")], text, len(text))
            return
        status, headers, answer, length = self._ask_upstream(body)
        if fault in ("short", "long"):
            answer = answer[:-1] if fault == "short" else answer + b"?"
            length, headers = len(answer), [h for h in headers if h[0].lower() != "content-range"]
        if fault == "slow":
            proxy.closing.wait(SLOW_S)
        if fault == "hour ahead":
            headers = [(name, _an_hour_later(name, value)) for name, value in headers]
        if fault.startswith("flip") and answer:
            if fault == "flip":
                headers = [h for h in headers if "checksum" not in h[0].lower()]
            middle = len(answer) // 2
            answer = answer[:middle] + bytes([answer[middle] ^ 1]) + answer[middle + 1 :]
        if fault not in ("reset", "stall"):
            self._answer(status, headers, answer, length)
            return
        self._answer(status, headers, answer[: len(answer) // 2], length)
        self.close_connection = True
        if fault == "stall":
            proxy.closing.wait()
        else:
            linger = struct.pack("ii", 1, 0)  # closing then sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            os.close(self.connection.detach())

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _request_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _ask_upstream(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes, int]:
        where = self.proxy.upstream
        upstream = http.client.HTTPConnection(where.hostname or "", where.port, timeout=30)
        # The Host header stays as signed.
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP_HEADERS:
                upstream.putheader(name, value)
        upstream.putheader("Content-Length", str(len(body)))
        upstream.endheaders(body)
        reply = upstream.getresponse()
        answer = reply.read()
        length = int(reply.headers.get("Content-Length") or len(answer))
        upstream.close()
        return reply.status, reply.getheaders(), answer, length

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, length: int
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in _HOP_HEADERS:
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self._send(body)

    def _send(self, body: bytes) -> None:
        if self.proxy.fault != "trickle":
            self.wfile.write(body)
            return
        step = TRICKLE_BYTES_PER_S // 10
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            self.proxy.closing.wait(0.1)


def _an_hour_later(name: str, value: str) -> str:
    """A header that tells a time, an hour later; others as they are."""
    if name.lower() not in ("date", "last-modified"):
        return value
    later = parsedate_to_datetime(value) + timedelta(hours=1)
    return format_datetime(later, usegmt=True)
