"""Web servers that lie, redirect or do not end: real ones, on this machine."""

import asyncio
import http.server
import itertools
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from yarl import URL

from lightship import storage
from lightship.errors import ConfigError, DataError
from lightship.storage import web
from lightship.storage.errors import Refused, StorageTimeout

DATA = bytes(range(256)) * 4


class Server:
    """A web server whose paths are functions of the request."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.paths: dict[str, Callable[[http.server.BaseHTTPRequestHandler], None]] = {}
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append((self.path, dict(self.headers)))
                try:
                    server.paths[self.path](self)
                except (ConnectionError, ssl.SSLError):
                    self.close_connection = True

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        scheme = "https" if certificate else "http"
        self.port = self.http.server_address[1]
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def serve(self, path: str, data: bytes = DATA, claimed: int | None = None) -> str:
        """The URL of a file, whose size is said to be `claimed`."""

        def answer(request: http.server.BaseHTTPRequestHandler) -> None:
            request.send_response(200)
            request.send_header("Content-Length", str(claimed or len(data)))
            request.end_headers()
            if request.command == "GET":
                request.wfile.write(data)

        self.paths[path] = answer
        return self.url + path

    def redirect(self, path: str, to: str, status: int = 302) -> str:
        def answer(request: http.server.BaseHTTPRequestHandler) -> None:
            request.send_response(status)
            request.send_header("Location", to)
            request.send_header("Content-Length", "0")
            request.end_headers()

        self.paths[path] = answer
        return self.url + path


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    monkeypatch.delenv(web.REDIRECTS, raising=False)
    started: list[Server] = []

    def begin(certificate: Path | None = None) -> Server:
        started.append(Server(certificate))
        return started[-1]

    yield begin
    for server in started:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed one for 127.0.0.1, with its key."""
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    key = path.with_suffix(".key")
    subprocess.run([*command, "-keyout", key, "-out", path], check=True, capture_output=True)
    path.write_text(path.read_text() + key.read_text())
    return path


# ---- redirects ---------------------------------------------------------------------------------


def everything(url: str, folder: Path) -> list[Callable[[], object]]:
    """All calls that read a URL."""
    return [
        lambda: storage.read_bytes(url),
        lambda: storage.read_range(url, 0, 4),
        lambda: storage.size_bytes(url),
        lambda: storage.exists(url),
        lambda: storage.download(url, folder / "out"),
        lambda: storage.open_binary(url).read(4),
    ]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("place", ["127.0.0.1", "localhost"])
def test_a_redirect_to_another_server_is_refused_before_it_is_asked(
    start, tmp_path: Path, status: int, place: str
) -> None:
    inner, outer = start(), start()
    inner.serve("/secret")
    url = outer.redirect("/set.zip", f"http://{place}:{inner.port}/secret", status)
    for call in everything(url, tmp_path):
        with pytest.raises(Refused, match=f"redirects to http://{place}:.*, another host"):
            call()
    assert inner.asked == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest/meta-data/iam", "http://[fd00:ec2::254]/", "http://10.0.0.1/",
        "//169.254.169.254/", "http://0/", "http://[::ffff:169.254.169.254]/", "http://2852039166/",
        "http://localhost:1/", "ftp://127.0.0.1/x", "file:///etc/passwd", "data:text/plain,x",
    ],
)  # fmt: skip
@pytest.mark.parametrize("allowed", ["", "*"])
def test_a_redirect_into_a_private_network_is_refused(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, allowed: str
) -> None:
    monkeypatch.setenv(web.REDIRECTS, allowed)
    url = start().redirect("/set.zip", target)
    for call in everything(url, tmp_path):
        with pytest.raises(Refused):
            call()


def test_a_redirect_on_the_same_server_is_followed(start, tmp_path: Path) -> None:
    server = start()
    server.serve("/there")
    for location in ("/there", f"{server.url}/there", "there"):
        url = server.redirect("/here", location)
        assert storage.read_bytes(url) == DATA
        storage.download(url, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == DATA


def test_a_chain_is_refused_where_it_leaves_the_server(start) -> None:
    inner, server = start(), start()
    inner.serve("/secret")
    server.redirect("/second", f"{inner.url}/secret")
    with pytest.raises(Refused, match="another host"):
        storage.read_bytes(server.redirect("/first", "/second"))
    assert inner.asked == []


def test_a_redirect_that_is_allowed(start, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, also into a private network; the password of the first host is not sent along."""
    inner, outer = start(), start()
    inner.serve("/file")
    url = outer.redirect("/here", f"http://localhost:{inner.port}/file")
    url = url.replace("http://", "http://user:hunter22@")
    for allowed in (f"localhost:{inner.port}", "example.com, localhost"):
        monkeypatch.setenv(web.REDIRECTS, allowed)
        assert storage.read_bytes(url) == DATA
    assert "Authorization" in outer.asked[-1][1]
    assert all("Authorization" not in headers for _, headers in inner.asked)


def test_redirects_without_end(start) -> None:
    server = start()
    with pytest.raises(Refused, match="TooManyRedirects"):
        storage.read_bytes(server.redirect("/a", "/a"))


@pytest.mark.parametrize(
    ("url", "target", "addresses", "allowed", "is_followed"),
    [
        ("http://a.org/x", "https://a.org/x", [], "", True),
        ("https://a.org/x", "https://www.a.org/x", [], "", True),
        ("https://a.org/x", "http://a.org/x", [], "*", False),
        ("https://a.org/x", "http://b.org/x", ["8.8.8.8"], "b.org", False),
        ("https://a.org/x", "https://a.org:8443/x", [], "", False),
        ("https://a.org/x", "https://b.a.org/x", ["8.8.8.8"], "", False),
        ("https://a.org/x", "https://evila.org/x", ["8.8.8.8"], "", False),
        ("https://a.org/x", "https://b.org/x", ["8.8.8.8"], "*", True),
        ("https://a.org/x", "https://b.org/x", ["8.8.8.8", "10.0.0.1"], "*", False),
        ("https://a.org/x", "https://b.org/x", ["64:ff9b::a9fe:a9fe"], "*", False),
        ("https://a.org/x", "https://b.org/x", ["::ffff:10.0.0.1"], "*", False),
        ("https://a.org/x", "https://b.org/x", ["2606:4700::1"], "*", True),
        ("https://a.org/x", "https://b.org/x", ["10.0.0.1"], "b.org", True),
        ("https://huggingface.co/x", "https://cas-bridge.xethub.hf.co/y", ["8.8.8.8"], "", True),
        ("https://huggingface.co/x", "https://cdn-lfs.huggingface.co/y", ["8.8.8.8"], "", True),
        ("https://huggingface.co/x", "https://cdn.hf.co/y", ["169.254.169.254"], "", False),
        ("https://huggingface.co/x", "https://evilhf.co/y", ["8.8.8.8"], "", False),
        ("https://github.com/x", "https://objects.githubusercontent.com/y", ["8.8.8.8"], "", True),
        ("https://a.org/x", "https://cdn.hf.co/y", ["8.8.8.8"], "", False),
    ],
)  # fmt: skip
def test_which_redirects_are_followed(
    url: str, target: str, addresses: list[str], allowed: str, is_followed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(web.REDIRECTS, allowed)

    async def why() -> str:
        async def resolve(host: str, port: object) -> list:
            return [(0, 0, 0, "", (address, 0)) for address in addresses]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        return await web._why_refused(URL(url), URL(target))

    assert (asyncio.run(why()) == "") is is_followed


# ---- TLS ---------------------------------------------------------------------------------------


def test_a_certificate_is_verified(
    start, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = start(certificate)
    url = server.serve("/file")
    for call in everything(url, tmp_path):
        with pytest.raises(ConfigError, match=r"TLS certificate is not .* in SSL_CERT_FILE$"):
            call()
    assert server.asked == []


def test_a_redirect_does_not_leave_tls(
    start, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # which aiohttp reads when it loads
    monkeypatch.setenv(web.REDIRECTS, "127.0.0.1,*")
    safe, plain = start(certificate), start()
    plain.serve("/file")
    urls = [safe.serve("/file"), safe.redirect("/here", f"{plain.url}/file")]
    code = "import sys; from lightship import storage; storage.read_bytes(sys.argv[1])"
    read, refused = [
        subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True)
        for url in urls
    ]
    assert read.returncode == 0, read.stderr
    assert "/file, without TLS" in refused.stderr
    assert plain.asked == []


# ---- bodies ------------------------------------------------------------------------------------


def endless(request: http.server.BaseHTTPRequestHandler) -> None:
    """A body in chunks that does not end, whatever range was asked for."""
    request.send_response(206 if "Range" in request.headers else 200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    for _ in itertools.count() if request.command == "GET" else ():
        request.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")


def test_a_body_without_end_is_not_kept(start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    server.paths["/endless"] = endless
    monkeypatch.setattr(web, "_MAX_UNSIZED_BYTES", 2**20)
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "2")
    with pytest.raises(Refused, match="does not end"):
        storage.read_bytes(f"{server.url}/endless")
    with pytest.raises((StorageTimeout, DataError)):
        storage.read_range(f"{server.url}/endless", 5, 9)


def test_a_size_beyond_memory_is_refused(start, monkeypatch: pytest.MonkeyPatch) -> None:
    url = start().serve("/large", claimed=2**50)
    with pytest.raises(Refused, match=f"has {2**50} bytes, too many"):
        storage.read_bytes(url)


def test_a_download_longer_than_announced_is_refused(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "2")
    head = server.serve("/liar", DATA)
    announce = server.paths["/liar"]
    server.paths["/liar"] = lambda r: announce(r) if r.command == "HEAD" else endless(r)
    with pytest.raises(StorageTimeout, match="came of a file of 1024 bytes"):
        storage.download(head, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_file_may_take_longer_than_the_deadline(start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server that knows no ranges."""
    server, size = start(), 20 * 2**20

    def slow(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(size))
        request.end_headers()
        for _ in range(40) if request.command == "GET" else ():
            request.wfile.write(bytes(size // 40))
            time.sleep(0.1)

    server.paths["/slow"] = slow
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "2")
    assert storage.read_small(f"{server.url}/slow", size) == bytes(size)


def test_a_trickle_is_given_up(start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the size that is announced would take years."""
    server = start()

    def trickle(request: http.server.BaseHTTPRequestHandler) -> None:
        is_range = "Range" in request.headers
        request.send_response(206 if is_range else 200)
        request.send_header("Content-Length", str(2**20 if is_range else 2**50))
        request.end_headers()
        for _ in range(600) if request.command == "GET" else ():
            request.wfile.write(b".")
            request.wfile.flush()
            time.sleep(0.1)

    server.paths["/trickle"] = trickle
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "2")
    with pytest.raises(StorageTimeout, match="bytes came in 2 s"):
        storage.download(f"{server.url}/trickle", tmp_path / "out")
    with pytest.raises(StorageTimeout):
        storage.read_range(f"{server.url}/trickle", 0, 2**20)
