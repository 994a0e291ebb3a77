"""The report as a person sees it: a real run's page in a real browser."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from tests.support import warm
from tests.support.browser import binary, browser

pytestmark = pytest.mark.skipif(
    binary() is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)

PICTURES = {
    # Section -> fewest pictures in it, of a run on the digits for one epoch.
    ".confused": 1,
    ".hardest": 24,
    ".predictions": 16,
}
TABLES = {".heat tbody tr": 10, ".two .rows tr": 10, "details .rows tr": 40}


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a short run on the embedded digits, started twice."""
    output = tmp_path_factory.mktemp("runs") / "digits"
    command = [warm.executable(), "fit", "--config", "digits"]
    command += ["--run.output", str(output), "--run.tracking", "none", "--trainer.max_epochs", "2"]
    for steps in ("20", "-1"):
        done = subprocess.run(
            [*command, "--trainer.max_steps", steps], capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr
        (output / "DONE").unlink()  # the second start goes on where the first was cut
    return output / "report" / "report.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture(params=["light", "dark"])
def opened(request, chromium: Browser, page_path: Path) -> Iterator[Page]:
    """The page as it opens from disk, without a network."""
    context = chromium.new_context(
        viewport={"width": 1000, "height": 900}, color_scheme=request.param, offline=True
    )
    page = context.new_page()
    page.requests, page.complaints = [], []  # type: ignore[attr-defined]
    page.on("request", lambda asked: page.requests.append(asked.url))  # type: ignore[attr-defined]
    page.on("console", lambda said: page.complaints.append(said.text))  # type: ignore[attr-defined]
    page.goto(page_path.as_uri())
    yield page
    context.close()


def test_pictures_and_tables_are_there(opened: Page) -> None:
    for section, fewest in PICTURES.items():
        pictures = opened.locator(f"{section} img")
        assert pictures.count() >= fewest, section
        sizes = pictures.evaluate_all("all => all.map(i => [i.naturalWidth, i.clientWidth])")
        assert all(drawn > 0 and shown > 40 for drawn, shown in sizes), section
    for details in opened.locator("summary").all():
        details.click()
    for rows, fewest in TABLES.items():
        found = opened.locator(rows)
        assert found.count() >= fewest, rows
        assert all(text.strip() for text in found.all_inner_texts())
    assert opened.locator(".starts tr").count() == 3  # its head, and both starts
    bars = opened.locator(".calibration .bar").evaluate_all(
        "all => all.map(b => b.getBBox().height)"
    )
    assert max(bars) > 100
    titles = opened.locator(".two h2").all_inner_texts()
    for title in ("Loss", "Accuracy", "Learning rate", "Images per second", "Data wait"):
        assert any(text.startswith(title) for text in titles), titles
    for line in opened.locator("svg polyline").all():
        assert line.evaluate("l => l.getTotalLength()") > 10


def test_it_asks_for_nothing_and_complains_of_nothing(opened: Page, page_path: Path) -> None:
    outside = [url for url in opened.requests if not url.startswith("data:")]  # type: ignore[attr-defined]
    assert outside == [page_path.as_uri()]
    assert opened.complaints == []  # type: ignore[attr-defined]


def test_text_can_be_read_on_its_background(opened: Page) -> None:
    """WCAG's contrast of 4.5 to 1 for text, measured on the colours that the browser drew."""
    contrast = """all => {
      const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => {
        v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 });
        return .2126 * r + .7152 * g + .0722 * b };
      const behind = e => { const c = getComputedStyle(e).backgroundColor;
        return /, 0\\)|transparent/.test(c) && e.parentElement ? behind(e.parentElement) : c };
      return all.map(e => { const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
        return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.innerText] }) }"""
    found = opened.locator("h1, h2, p, .label, .fact span, .rows td, .legend, figcaption span")
    assert found.count() > 100
    assert [text for ratio, text in found.evaluate_all(contrast) if ratio < 4.5 and text] == []


@pytest.mark.parametrize("width_px", [390, 1600])
def test_it_fits_a_telephone_and_a_wide_screen(
    chromium: Browser, page_path: Path, width_px: int
) -> None:
    page = chromium.new_page(viewport={"width": width_px, "height": 800})
    page.goto(page_path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width_px
    page.close()
