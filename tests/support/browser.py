"""Headless Chromium, the one that is installed (Debian: `apt-get install chromium`)."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def binary() -> str | None:
    """Where the browser is, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Browser]:
    """A started browser with a profile of its own."""
    with sync_playwright() as playwright:
        # Root may not have Chromium's sandbox; the pages shown are ours.
        started = playwright.chromium.launch(
            executable_path=binary(), args=[*FLAGS, "--no-sandbox"], timeout=60_000
        )
        try:
            yield started
        finally:
            started.close()
