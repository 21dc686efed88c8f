"""The large names benchmark on packages in miniature: which picture and name belongs to which thing, what is held out."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from PIL import Image

from megatron_moellava.config import DataError
from megatron_moellava.evaluation.quickstart.metrics import questions_of
from tests.helpers.paths import REPO

COLORS = {"noto": (255, 0, 0), "twemoji": (0, 160, 0), "fluent": (0, 0, 255)}
# emoji -> file names by the first two vendors, icon by the last; the umbrella's file has the variation selector
THINGS = {"🐱": ("1f431", "cat-face"), "☂": ("2602-fe0f", "umbrella"), "🦊": ("1f98a", None)}


@pytest.fixture
def packages(tmp_path):
    """node_modules with three things; the fox is not in the set of icons, and the dog has no Welsh name."""
    from names import LANGUAGE_NAMES

    root = tmp_path / "node_modules"
    for language in LANGUAGE_NAMES:
        known = {text: {"default": ["x"], "tts": [f"{language.upper()} {text}"]} for text in THINGS}
        if language == "en":
            known = {text: {"tts": [name]} for text, name in zip(THINGS, ("cat face", "umbrella", "fox"), strict=True)}
        known |= {"🐶": {"tts": ["dog"]}} if language != "cy" else {"🐶": {"default": ["ci"]}}
        write(
            root / f"cldr-annotations-full/annotations/{language}/annotations.json",
            {"annotations": {"annotations": known}},
        )
    for package, vendor in (("google", "noto"), ("twitter", "twemoji")):
        folder = root / f"emoji-datasource-{package}/img/{package}/64"
        folder.mkdir(parents=True)
        for code, _ in [*THINGS.values(), ("1f436", None)]:
            Image.new("RGBA", (64, 64), (*COLORS[vendor], 255)).save(folder / f"{code}.png")
    body = '<rect width="32" height="32" fill="#0000ff"/>'
    icons = {slug: {"body": body} for _, slug in THINGS.values() if slug and slug != "umbrella"}
    icons["open-umbrella"] = {"body": body}
    aliases = {"umbrella": {"parent": "open-umbrella"}}
    write(
        root / "@iconify-json/fluent-emoji/icons.json", {"icons": icons, "aliases": aliases, "width": 32, "height": 32}
    )
    return root


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def middle(path):
    return Image.open(path).getpixel((36, 36))


def test_a_vendor_is_held_out_and_every_training_vendor_shows_every_thing(packages, tmp_path):
    from names_full import write_full

    out = tmp_path / "out"
    counts = write_full(packages, out, turns=4)
    assert counts == {"things": 3, "facts": 84, "rows": 63, "held_out": 8, "seen": 12}
    rows = json.loads((out / "names.json").read_text())
    shown = Counter((row["image"].split("/")[2], row["image"].split("/")[3][:-6]) for row in rows)
    codes = ("1F431", "1F98A", "2602")
    assert shown == {(vendor, code): 7 for vendor in ("openmoji", "noto", "twemoji") for code in codes}
    for vendor in ("noto", "twemoji"):
        assert middle(out / f"images/names/train/{vendor}/1F431-0.png") == COLORS[vendor]
    held = [json.loads(line) for line in (out / "names_test.jsonl").open()]
    assert {row["image"] for row in held} == {f"names/test/fluent/{code}-0.png" for code in ("1F431", "2602")}
    assert middle(out / "images" / held[0]["image"]) == COLORS["fluent"]
    seen = [json.loads(line) for line in (out / "names_seen_test.jsonl").open()]
    assert {row["image"].split("/")[2] for row in seen} == {"openmoji"}
    assert not {row["image"] for row in held + seen} & {row["image"] for row in rows}


def test_names_are_cldrs_in_small_letters_and_things_without_one_are_left_out(packages, tmp_path):
    from names_full import write_full

    write_full(packages, tmp_path / "out", turns=28)
    rows = questions_of(json.loads((tmp_path / "out/names.json").read_text()))
    german = {row["answer"] for row in rows if row["question"] == "what is this called in german?"}
    assert german == {"de 🐱", "de ☂", "de 🦊"}
    assert len({row["question"] for row in rows}) == 28


def test_every_vendor_and_the_names_are_attributed(packages, tmp_path):
    from names_full import write_full

    write_full(packages, tmp_path / "out", things=1)
    text = (tmp_path / "out/images/names/ATTRIBUTION.md").read_text()
    for name in ("OpenMoji", "Noto Emoji", "Apache License 2.0", "Twemoji", "CC-BY-4.0", "Fluent Emoji", "MIT", "CLDR"):
        assert name in text


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("O button (blood type)", "o-button-blood-type"),
        ("twelve o’clock", "twelve-oclock"),
        ("1st place medal", "1st-place-medal"),
    ],
)
def test_icon_sets_name_a_thing_by_its_words(name, slug):
    from names_full import slug_of

    assert slug_of(name) == slug


def test_without_npm_the_message_says_how_to_go_on(tmp_path, monkeypatch):
    from names_full import fetch

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"needs npm, which is not installed here.*apt-get install npm.*--packages"):
        fetch(tmp_path / "build")
    assert not (tmp_path / "build").exists()


def test_an_npm_that_fails_is_no_success(tmp_path, monkeypatch):
    from names_full import fetch

    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\nexit 7\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(DataError, match="npm ended with 7"):
        fetch(tmp_path / "build")


def test_packages_that_are_there_are_not_fetched_again(packages, tmp_path, monkeypatch):
    from names_full import VERSIONS, fetch

    for name in VERSIONS:
        write(packages / name / "package.json", {})
    monkeypatch.setenv("PATH", "")
    assert fetch(tmp_path) == packages


def test_facts_by_several_vendors_are_asked_of_the_one_held_out(packages, tmp_path, monkeypatch):
    """Of the grid `knowledge_vendors`; the fox, of which the vendor held out has no picture, is left out."""
    monkeypatch.syspath_prepend(str(REPO / "examples/ablations"))
    from facts import write_facts

    out = tmp_path / "facts"
    assert write_facts(out, things=None, views=2, vendors=packages)["facts"] == 16
    rows = json.loads((out / "facts.json").read_text())
    shown = Counter((row["image"].split("/")[1], row["image"].split("/")[2][:-6]) for row in rows)
    assert shown == {(vendor, code): 2 for vendor in ("openmoji", "noto", "twemoji") for code in ("1F431", "2602")}
    asked = [json.loads(line) for line in (out / "test.jsonl").open()]
    assert {row["image"] for row in asked} == {f"names/fluent/{code}-0.png" for code in ("1F431", "2602")}
    assert {middle(out / "images" / row["image"]) for row in asked} == {COLORS["fluent"]}
    assert not any("/fluent/" in row["image"] for row in json.loads((out / "captions.json").read_text()))
    text = (out / "images/names/ATTRIBUTION.md").read_text()
    assert "CC-BY-SA-4.0" in text and "Fluent Emoji by Microsoft" in text


@pytest.mark.parametrize("program", ["quickstart/names_full.py --packages", "ablations/facts.py --vendors"])
def test_a_folder_without_the_vendors_says_what_it_lacks(packages, tmp_path, program):
    (packages / "emoji-datasource-google").rename(tmp_path / "elsewhere")
    name, option = program.split()
    command = [sys.executable, str(REPO / "examples" / name), option, str(packages), "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == DataError.exit_code and "Traceback" not in ended.stderr
    assert f"{packages} has no emoji-datasource-google; `make names-full` fetches" in ended.stderr
