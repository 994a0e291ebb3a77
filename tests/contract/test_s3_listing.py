"""Listings of an S3 server that does not end them as it should."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from lightship import storage
from lightship.storage import StorageTimeout

pytestmark = pytest.mark.timeout(90)  # an endless listing is a failure


@contextmanager
def server(objects: int, tokens: Callable[[int], str | None]) -> Iterator[str]:
    """The endpoint of a bucket whose pages are as many as asked for.

    Args:
        objects: Of a page.
        tokens: Number of a request -> the token of the next page; None: there is none.
    """
    requests = itertools.count()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            number = next(requests)
            token = tokens(number)
            more = token and f"<NextContinuationToken>{token}</NextContinuationToken>"
            contents = (
                f"<Contents><Key>set/{token}-{i}.png</Key><Size>3</Size><ETag>a</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                for i in range(objects)
            )
            body = (
                '<?xml version="1.0"?><ListBucketResult><IsTruncated>true</IsTruncated>'
                f"{''.join(contents)}{more or ''}</ListBucketResult>"
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        Thread(target=found.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


@pytest.mark.parametrize(
    ("client", "tokens", "why"),
    [
        ("obstore", lambda number: "a", "a used token"),
        ("obstore", lambda number: "abc"[number % 3], "a used token"),
        ("s3fs", lambda number: "a", "a used token"),
        ("s3fs", lambda number: "xabc"[number and number % 3 + 1], "a used token"),
        ("s3fs", lambda number: None, "no token"),
    ],
    ids=["obstore one", "obstore circle", "s3fs one", "s3fs circle", "s3fs none"],
)
def test_a_listing_without_an_end_is_a_fault_that_may_pass(
    monkeypatch: pytest.MonkeyPatch, client: str, tokens: Callable[[int], str | None], why: str
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv("LIGHTSHIP_S3_CLIENT", client)
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "6")
    objects = 1000 if client == "obstore" else 1  # of so many it makes a page itself
    with server(objects, tokens) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(StorageTimeout, match=f"the listing goes on with {why}") as error:
            storage.list_files("s3://bucket/set")
    assert error.value.exit_code == 74
