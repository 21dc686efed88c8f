"""Every document is reachable, every link and anchor leads somewhere, and files named in documents and sources exist."""

import re
import subprocess
import unicodedata
from pathlib import Path

from tests.helpers.paths import REPO

DOCUMENTS = sorted(
    path for path in REPO.rglob("*.md") if not any(part in ("runs", "build") or "venv" in part for part in path.parts)
)
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.*?) *#*$", re.MULTILINE)


def prose(path: Path) -> str:
    """The text without its code blocks."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchor(heading: str) -> str:
    """The name that GitHub and MkDocs give a heading: `What it does: --x` -> what-it-does---x."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    text = unicodedata.normalize("NFKC", text).lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(path: Path) -> list[str]:
    return [anchor(heading) for heading in HEADING.findall(prose(path))]


def links(path: Path) -> list[str]:
    return [target for target in LINK.findall(prose(path)) if "://" not in target and not target.startswith("mailto:")]


def test_links_and_anchors_lead_somewhere():
    broken = []
    for path in DOCUMENTS:
        for target in links(path):
            name, _, fragment = target.partition("#")
            there = (path.parent / name).resolve() if name else path
            if not there.exists() or (fragment and fragment not in anchors(there)):
                broken.append(f"{path.relative_to(REPO)}: {target}")
    assert not broken, "\n".join(broken)


def test_anchors_are_the_same_on_github_and_on_the_site():
    """MkDocs joins repeated hyphens and numbers equal headings its own way; avoid both."""
    odd = []
    for path in REPO.glob("docs/**/*.md"):
        names = anchors(path)
        odd += [f"{path.relative_to(REPO)}: {name}" for name in names if "--" in name or names.count(name) > 1]
    assert not odd, "\n".join(odd)


def test_every_document_is_reached_from_the_index():
    index = REPO / "docs/index.md"
    seen, waiting = set(), [index]
    while waiting:
        path = waiting.pop()
        if path not in seen and path.suffix == ".md":
            seen.add(path)
            waiting += [(path.parent / target.partition("#")[0]).resolve() for target in links(path)]
    lost = [str(path.relative_to(REPO)) for path in REPO.glob("docs/**/*.md") if path not in seen]
    assert not lost, f"no way leads from docs/index.md to {lost}"


def test_pictures_are_shown_somewhere():
    shown = {(path.parent / target).resolve() for path in DOCUMENTS for target in links(path)}
    lost = [str(path.relative_to(REPO)) for path in REPO.glob("docs/**/*.png") if path not in shown]
    assert not lost, lost


def test_files_that_texts_name_exist():
    """In documents, sources, scripts and settings: whatever looks like a file of docs, tests, tools, examples, benchmarks."""
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=REPO, check=True).stdout.split()
    readable = (".md", ".py", ".sh", ".yaml", ".yml", ".toml")
    named = re.compile(r"(?<![\w/.-])(?:docs|tests|tools|examples|benchmarks)/[\w./-]*\w\.(?:md|py|sh|yaml|yml|png)\b")
    missing = []
    for name in tracked:
        if not name.endswith(readable) and name not in ("Makefile", "Dockerfile"):
            continue
        if name == "CHANGELOG.md" or not (REPO / name).exists():
            continue
        for found in named.findall((REPO / name).read_text(encoding="utf-8")):
            if not (REPO / found).exists() and found != "docs/Evaluation.md":  # LLaVA's
                missing.append(f"{name}: {found}")
    assert not missing, "\n".join(missing)


def test_the_map_names_every_room():
    """AGENTS.md: each folder and module of the package has its place on the map."""
    text = (REPO / "AGENTS.md").read_text()
    rooms = [path.name for path in (REPO / "megatron_moellava").iterdir() if not path.name.startswith("_")]
    missing = [name for name in rooms if name != "py.typed" and f"`{name}" not in text]
    assert not missing, missing
