"""README's pictures, made by a real run: `make pictures`. Needs Chromium and tmux.

The run trains on class folders given by CIFAR10, else on the embedded digits, in a terminal; the
picture of the terminal is its screen when about half of the steps are done.
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

from tests.support.browser import browser

FOLDER = Path(__file__).parents[2] / "docs" / "pictures"
MOST_BYTES = 300_000
COLUMNS, ROWS = 108, 17
BOUND_S = 1800


def run_in_terminal(command: list[str], output: Path) -> str:
    """Run `command` in a terminal until `output` is DONE; its screen near the middle, as ANSI."""
    name = f"pictures-{output.parent.name}"
    tmux = ["tmux", "-L", name]
    shown = " ".join(command)
    subprocess.run(
        [*tmux, "new-session", "-d", "-x", str(COLUMNS), "-y", str(ROWS), f"{shown}; sleep 60"],
        check=True,
    )
    middle, ends_s = "", time.monotonic() + BOUND_S
    try:
        while not (output / "DONE").exists():
            if time.monotonic() > ends_s:
                raise TimeoutError(f"no DONE after {BOUND_S} s")
            capture = [*tmux, "capture-pane", "-p", "-e"]
            screen = subprocess.run(capture, check=True, capture_output=True, text=True).stdout
            step = re.search(r"(\d+)/(\d+)\x1b?\S* +.*left", screen)
            if step and int(step[1]) <= 0.75 * int(step[2]):
                middle = screen
            time.sleep(0.25)
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
    return middle


def terminal_page(screen: str, command: str) -> str:
    """The screen as an SVG picture in a page."""
    console = Console(width=COLUMNS, record=True, file=io.StringIO())
    console.print(Text.from_ansi(f"\x1b[1m$ {command}\x1b[0m\n{screen.rstrip()}"))
    return f"<body style='margin:0'>{console.export_svg(title='lightship')}</body>"


def small(path: Path) -> None:
    """Fewer colours until the picture may be committed."""
    picture = Image.open(path).convert("RGB")
    for colours in (256, 128, 64):
        if path.stat().st_size <= MOST_BYTES:
            return
        picture.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size <= MOST_BYTES, f"{path} has {path.stat().st_size} bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar10", help="class folders of CIFAR-10")
    cifar10 = parser.parse_args().cifar10
    FOLDER.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="lightship-"))
    output = work / "cifar10"
    told = "lightship fit --config cifar10 --trainer.max_epochs 2" if cifar10 else "lightship fit"
    flags = ["--run.output", str(output), "--run.tracking", "none"]
    flags += ["--data.root", cifar10] if cifar10 else ["--config", "digits"]
    command = [sys.executable, "-m", *told.split(), *flags]
    try:
        screen = run_in_terminal(command, output)
        assert screen, "the run ended before its screen was seen"
        screen = screen.replace(str(work), "runs").replace(str(cifar10), "images")
        with browser() as chromium:
            page = chromium.new_page(viewport={"width": 1000, "height": 400})
            page.set_content(terminal_page(screen, told))
            page.locator("svg").screenshot(path=FOLDER / "terminal.png")
            page = chromium.new_page(viewport={"width": 1000, "height": 1250})
            page.goto((output / "report" / "report.html").as_uri())
            page.screenshot(path=FOLDER / "report.png")
    finally:
        shutil.rmtree(work)
    for name in ("terminal.png", "report.png"):
        small(FOLDER / name)
        print(f"{FOLDER / name}: {(FOLDER / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
