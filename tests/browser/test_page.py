"""The page in a real Chromium, against a server of its own (`make test-browser`).

For the screenshots in docs/: MOELLAVA_CHECKPOINT=FOLDER is served instead of a tiny random model, MOELLAVA_PICTURE=FILE is
asked about, and MOELLAVA_SCREENSHOTS=FOLDER keeps them. MOELLAVA_MODALITIES=FOLDER likewise serves one with depth and thermal,
which is asked about MOELLAVA_DEPTH=FILE and MOELLAVA_THERMAL=FILE.
"""

import base64
import contextlib
import io
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from megatron_moellava.data.quantities import open_picture
from tests.helpers.inference_models import picture
from tests.helpers.modalities import DEPTH, THERMAL, write_pictures
from tests.helpers.serving import serving
from tests.helpers.videos import write_video

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def server():
    checkpoint = os.environ.get("MOELLAVA_CHECKPOINT")
    with serving(checkpoint=checkpoint) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # CI runs as root
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    context = browser.new_context(viewport={"width": 1360, "height": 860})
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: complaints.append(request.url) if is_outside(request.url, server.url) else None)
    page.goto(server.url)
    page.wait_for_selector("#examples img")
    yield page
    context.close()
    assert not [text for text in complaints if "the server responded with" not in text], complaints


def is_outside(url: str, own: str) -> bool:
    return not url.startswith((own, "data:", "blob:"))


@pytest.fixture
def file(tmp_path):
    if "MOELLAVA_PICTURE" in os.environ:
        return os.environ["MOELLAVA_PICTURE"]
    path = tmp_path / "picture.png"
    picture(2, (64, 48)).save(path)
    return path


def ask(page: Page, text: str) -> str:
    answers = page.locator(".turn.assistant .meta").count()
    page.fill("#question", text)
    page.click("#send")
    until(page, f"document.querySelectorAll('.turn.assistant .meta').length > {answers}")
    return page.locator(".turn.assistant .said").last.inner_text()


def until(page: Page, condition: str) -> None:
    """Wait for a JavaScript condition (Playwright's own way needs eval, which the page's policy forbids)."""
    deadline = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"never came true: {condition}"
        page.wait_for_timeout(50)


def keep(page: Page, name: str) -> None:
    folder = os.environ.get("MOELLAVA_SCREENSHOTS")
    if folder:
        page.wait_for_timeout(300)
        page.screenshot(path=str(Path(folder) / name))


def test_upload_ask_overlay_and_second_question(page, file):
    keep(page, "page_start.png")
    page.set_input_files("#file", str(file))
    page.wait_for_selector("#thumbs img")
    assert ask(page, "what is the color of the shape?")
    assert page.locator("#pictures canvas").count() == 1
    assert page.locator("#layers button").count() == page.locator("#small button").count() > 0
    assert page.locator(".word").count() > 4
    box = page.locator("#pictures canvas").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    assert "expert" in page.inner_text("#under")
    keep(page, "page_experts.png")
    before = page.evaluate("document.querySelector('#pictures canvas').toDataURL()")
    page.locator("#layers button").last.click()
    assert page.evaluate("document.querySelector('#pictures canvas').toDataURL()") != before
    assert ask(page, "what shape is in the image?")
    assert page.locator(".turn.user").count() == 2


@pytest.mark.skipif("MOELLAVA_CHECKPOINT" in os.environ, reason="a trained model may answer in one word")
def test_the_answer_appears_while_it_is_said(page, server):
    page.evaluate("document.getElementById('max_tokens').value = 200")
    with slowed(server.engine):
        page.fill("#question", "Say something long")
        page.click("#send")
        until(page, "document.querySelector('.turn.running .said')?.textContent.length > 0")
        lengths = []
        for _ in range(2):
            page.wait_for_timeout(400)
            lengths.append(len(page.locator(".turn.assistant .said").inner_text()))
        page.click("#stop")
    assert lengths[0] < lengths[1], "the text did not grow"
    page.wait_for_selector("#send")
    deadline = time.monotonic() + 20
    while server.service.open_requests:
        assert time.monotonic() < deadline, "stopping did not cancel the request"
        time.sleep(0.05)


@contextlib.contextmanager
def slowed(engine):
    """A model whose every token takes a moment, as a large one's does."""
    step = engine.step
    engine.step = lambda: (time.sleep(0.05), step())[1]
    yield
    engine.step = step


def test_paste_drop_and_examples_give_pictures(page):
    make = """(kind) => {
        const canvas = document.createElement('canvas'); canvas.width = canvas.height = 20;
        canvas.getContext('2d').fillRect(0, 0, 9, 9);
        const bytes = Uint8Array.from(atob(canvas.toDataURL().split(',')[1]), c => c.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], 'a.png', {type: 'image/png'}));
        const options = {bubbles: true, cancelable: true, [kind === 'paste' ? 'clipboardData' : 'dataTransfer']: data};
        document.body.dispatchEvent(new (kind === 'paste' ? ClipboardEvent : DragEvent)(kind, options));
    }"""
    for number, kind in enumerate(("paste", "drop"), start=1):
        page.evaluate(make, kind)
        until(page, f"document.querySelectorAll('#thumbs img').length === {number}")
    page.locator("#examples button").first.click()
    until(page, "document.querySelectorAll('#thumbs img').length === 3")
    page.locator("#thumbs button").first.click()
    assert page.locator("#thumbs img").count() == 2


def test_regenerate_replaces_the_answer_and_history_survives_a_reload(page, file):
    page.set_input_files("#file", str(file))
    page.wait_for_selector("#thumbs img")
    ask(page, "What color is the shape?")
    page.click("#regenerate")
    page.wait_for_selector(".turn.assistant .meta", timeout=60_000)
    until(page, "!document.getElementById('regenerate').disabled")
    assert page.locator(".turn.assistant").count() == page.locator(".turn.user").count() == 1
    page.reload()
    page.wait_for_selector("#history button")
    page.locator("#history button").first.click()
    assert page.locator(".turn.user img").count() == 1
    assert page.locator("#pictures canvas").count() == 1
    page.click("#new")
    assert page.locator(".turn").count() == 0


def test_errors_are_shown_and_the_page_goes_on(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    page.set_input_files("#file", str(broken))
    assert "not a picture" in page.wait_for_selector(".turn.error").inner_text()
    page.evaluate("document.getElementById('temperature').value = 9")
    page.fill("#question", "hello")
    page.click("#send")
    until(page, "document.querySelectorAll('.turn.error').length > 0")
    assert "temperature" in page.locator(".turn.error").last.inner_text()
    page.evaluate("document.getElementById('temperature').value = 0")
    assert ask(page, "hello") is not None


def test_an_answer_cannot_smuggle_in_a_script(page, server):
    """The model's words are text: whatever a picture makes it say must not run."""
    stream = server.engine.prompter.tokenizer.decode
    server.engine.prompter.tokenizer.decode = lambda ids: '<img src=x onerror="window.owned=1"><b>bold</b>'
    try:
        said = ask(page, "<i>question</i>")
    finally:
        server.engine.prompter.tokenizer.decode = stream
    assert "<b>bold</b>" in said
    assert page.evaluate("window.owned") is None


def test_places_of_an_answer_are_drawn_where_they_are(page):
    """A box, a point and a polygon in a grey picture of 100 x 50: the pixels on their lines have the colours of places."""
    page.evaluate(
        """() => {
          const canvas = Object.assign(document.createElement("canvas"), {width: 100, height: 50});
          const pen = canvas.getContext("2d");
          pen.fillStyle = "#808080"; pen.fillRect(0, 0, 100, 50);
          const regions = [
            {kind: "box", points: [[10, 10], [40, 40]], image: 0},
            {kind: "point", points: [[70, 25]], image: 0},
            {kind: "polygon", points: [[80, 5], [95, 5], [95, 20]], image: 0},
          ];
          talk = {id: 1, turns: [
            {role: "user", text: "where?", images: [canvas.toDataURL("image/png")]},
            {role: "assistant", text: "[100, 200, 400, 800]", regions},
          ]};
          showTalk();
        }"""
    )
    until(page, "document.querySelector('canvas.places')?.width > 300")
    grey = page.evaluate(
        """() => {
          const canvas = document.querySelector("canvas.places"), scale = canvas.width / 100, pen = canvas.getContext("2d");
          const color = (x, y) => [...pen.getImageData(x * scale, y * scale, 1, 1).data.slice(0, 3)];
          const isGrey = (x, y) => color(x, y).every(level => level === 128);
          return [[10, 25], [40, 25], [25, 10], [25, 40], [95, 12], [25, 25], [60, 45]].map(([x, y]) => isGrey(x, y));
        }"""
    )
    assert grey == [False, False, False, False, False, True, True]


def test_a_video_is_taken_shown_and_asked_about(page, tmp_path):
    page.set_input_files("#file", str(write_video(tmp_path / "v.webm", codec="libvpx-vp9", frames=12)))
    until(page, "document.querySelectorAll('#thumbs video').length === 1")
    page.evaluate("document.getElementById('max_tokens').value = 3")
    ask(page, "What happens?")
    assert page.locator(".turn.user video").count() == 1
    assert not page.locator(".turn.error").count()
    tokens = page.evaluate("view.routing.tokens.filter(token => 'image' in token).map(token => token.image)")
    assert {*tokens} == set(range(8))


@pytest.fixture(scope="module")
def seeing(browser):
    """A page over a model that knows depth, with a tower of its own, and thermal."""
    own = replace(DEPTH, tower="siglip-tiny", projector="own")
    checkpoint = os.environ.get("MOELLAVA_MODALITIES")
    with serving(checkpoint=checkpoint, engine_options={} if checkpoint else {"modalities": (own, THERMAL)}) as running:
        context = browser.new_context(viewport={"width": 1360, "height": 860})
        page = context.new_page()
        page.goto(running.url)
        page.wait_for_selector("#kinds button")
        yield page
        context.close()


def test_depth_and_thermal_files_are_shown_as_the_model_sees_them_and_asked_about(seeing, file, tmp_path):
    """A picture, a 16-bit PNG and a TIFF, which no browser shows: each overlay has the grid of its own tower."""
    page, files = seeing, [os.environ.get(f"MOELLAVA_{name}") for name in ("DEPTH", "THERMAL")]
    if not all(files):
        write_pictures(tmp_path)
        files = [str(tmp_path / "depth/1.png"), str(tmp_path / "thermal/1.tif")]
    assert page.locator("#kinds button").all_inner_texts() == ["+ depth", "+ thermal"]
    assert set(page.get_attribute("#file_thermal", "accept").split(",")) >= {".tif", ".tiff", ".png"}
    page.set_input_files("#file", str(file))
    for count, (name, path) in enumerate(zip(("depth", "thermal"), files, strict=True), start=1):
        page.set_input_files(f"#file_{name}", path)
        until(page, f"document.querySelectorAll('#thumbs small').length === {count}")
    assert page.locator("#thumbs small").all_inner_texts() == ["depth", "thermal"]
    shown = page.evaluate("pending[1].shown")
    levels, _ = open_picture(files[0], DEPTH, "depth")
    if not os.environ.get("MOELLAVA_MODALITIES"):
        with Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2]))) as image:
            assert image.tobytes() == levels.tobytes(), "as the record of the modality shows its levels"
    keep(page, "page_modalities_start.png")
    page.evaluate("document.getElementById('max_tokens').value = 24")
    ask(page, "which is nearer, left or right?")
    assert not page.locator(".turn.error").count() and page.locator(".turn.user img").count() == 3
    assert page.locator("#pictures figcaption").all_inner_texts() == ["image", "depth", "thermal"]
    assert page.locator("#share span").all_inner_texts() == ["image", "depth", "thermal", "words"]
    grids = page.evaluate("[0, 1, 2].map(number => gridOf(number).join(' x '))")
    patches = page.evaluate(
        "[0, 1, 2].map(number => view.routing.tokens.filter(token => token.image === number).length)"
    )
    if not os.environ.get("MOELLAVA_MODALITIES"):
        assert grids == ["6 x 6", "4 x 4", "6 x 6"] and patches == [36, 16, 36]
    keep(page, "page_modalities.png")
    page.reload()
    page.locator("#history button").first.click()
    until(page, "document.querySelectorAll('#pictures canvas').length === 3")
    assert ask(page, "and the other?") is not None, "a conversation goes on with the files that it has shown"


@pytest.mark.skipif("MOELLAVA_MODALITIES" in os.environ, reason="its records may take such files")
def test_a_file_that_is_not_what_its_modality_declares_is_refused_with_the_reason(seeing, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "flat.png")
    seeing.click("#new")
    seeing.set_input_files("#file_depth", str(tmp_path / "flat.png"))
    said = seeing.wait_for_selector(".turn.error").inner_text()
    assert said.startswith("flat.png: ") and "holds uint8" in said and "levels=uint16" in said
    assert not seeing.locator("#thumbs img").count()
