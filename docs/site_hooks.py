"""What the site has beyond the files of docs/: a page of API for every room. Links that leave docs/ become text."""

import re
from pathlib import Path

from mkdocs.structure.files import File

PACKAGE = Path(__file__).parents[1] / "megatron_moellava"
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:README|CONTRIBUTING|AGENTS|CHANGELOG|SECURITY)\.md[^)]*\)")


def rooms() -> dict[str, list[str]]:
    """{page: modules}: each folder of the package, and the modules beside them on one page."""
    pages: dict[str, list[str]] = {"groundwork": []}
    for path in sorted(PACKAGE.rglob("*.py")):
        inner = path.relative_to(PACKAGE).with_suffix("").parts
        if inner[-1] in ("__init__", "__main__"):
            continue
        page = inner[0] if len(inner) > 1 else "groundwork"
        pages.setdefault(page, []).append(".".join((PACKAGE.name, *inner)))
    return pages


def on_files(files, config):
    pages = rooms()
    for name, modules in pages.items():
        text = f"# {name}\n\n" + "\n".join(f"::: {module}\n" for module in modules)
        files.append(File.generated(config, f"api/{name}.md", content=text))
    index = "# API\n\nFrom the docstrings of the package, a page for every room.\n\n"
    index += "\n".join(f"- [{name}]({name}.md)" for name in pages)
    files.append(File.generated(config, "api/index.md", content=index))
    return files


def on_page_markdown(markdown, page, config, files):
    return OUTSIDE.sub(r"\1", markdown)
