"""A web site on this machine, in place of those that publish weights."""

import http.server
import threading
from pathlib import Path

import pytest


class Site:
    """A folder on a local HTTP server, until it is closed.

    Attributes:
        root: The folder.
        gets: Paths that were asked for by GET.
        url: Of the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.gets = root, []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(handler, *args) -> None:
                super().__init__(*args, directory=str(root))

            def do_GET(handler) -> None:
                self.gets.append(handler.path.lstrip("/"))
                super().do_GET()

            def log_message(handler, *args) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def put(self, path: str, data: bytes) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self) -> "Site":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def without_other_sources(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches of weights below `folder`, no mirror, and 3 s for a site to answer."""
    for name in ("LIGHTSHIP_CACHE", "TORCH_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(folder / name))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "HF_HUB_CACHE"))
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "3")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("HF_ENDPOINT", "LIGHTSHIP_WEIGHTS_MIRROR"):
        monkeypatch.delenv(name, raising=False)
