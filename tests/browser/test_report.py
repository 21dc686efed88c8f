"""The routing report in a real Chromium without a network: every picture shows, nothing is fetched, no text runs."""

import shutil

import pytest
from playwright.sync_api import sync_playwright

from megatron_moellava.analysis.command import write_report
from tests.helpers.made_routes import routes, similarity

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """(page, everything the browser complained about or asked for)"""
    folder = tmp_path_factory.mktemp("report")
    name = 'runs/<img src="http://example.invalid/x.png" onerror="window.owned=1">'
    write_report(folder, name, ["a.json"], routes(), similarity(), pca=True)
    alone = folder / "moved" / "report.html"  # without the pictures beside it
    alone.parent.mkdir()
    shutil.copy(folder / "report.html", alone)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(offline=True, viewport={"width": 1200, "height": 900})
        page, heard = context.new_page(), []
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("console", lambda message: heard.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: heard.append(request.url) if request.url.startswith("http") else None)
        page.goto(alone.as_uri())
        yield page, heard
        browser.close()


def test_every_picture_shows_offline(shown):
    page, heard = shown
    widths = page.evaluate("Array.from(document.images, image => image.naturalWidth)")
    assert len(widths) == 10
    assert min(widths) > 100
    assert heard == []


def test_names_are_text(shown):
    page, _ = shown
    assert page.evaluate("window.owned") is None
    assert "<img src=" in page.inner_text("h1")


def test_nothing_is_wider_than_the_window(shown):
    page, _ = shown
    for width in (1200, 420):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_links_lead_to_the_sections(shown):
    page, _ = shown
    targets = page.evaluate("Array.from(document.querySelectorAll('nav a'), link => link.getAttribute('href'))")
    assert len(targets) == 7
    assert all(page.locator(target).count() == 1 for target in targets)
