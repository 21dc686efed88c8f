"""One HTML file that holds a whole routing report: pictures inlined, no script, nothing fetched from anywhere."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

STYLE = """
:root { color-scheme: light dark }
body { overflow-wrap: anywhere; font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
img { max-width: 100%; background: #fff; border-radius: 4px }
table { border-collapse: collapse; font-size: .85rem; display: block; overflow-x: auto }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.warning { border-left: 4px solid #c0392b; background: #c0392b18; padding: .5rem .9rem; margin: .6rem 0 }
.good { border-left: 4px solid #27ae60; background: #27ae6018; padding: .5rem .9rem; margin: .6rem 0 }
nav a { margin-right: 1rem } figure { margin: 1rem 0 } figcaption, .note { color: #777; font-size: .85rem }
"""
# What a browser may do with the file: show it. A report about strangers' pictures and questions runs nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(slots=True)
class Section:
    """One heading of the report with its text, pictures (PNG files) and tables."""

    title: str
    text: str = ""
    pictures: list[Path] = field(default_factory=list)
    tables: list[tuple[Sequence[str], Sequence[Sequence[str]]]] = field(default_factory=list)  # (head, rows)


def write_html(
    path: Path, title: str, facts: dict[str, str], warnings: Sequence[str], sections: Sequence[Section]
) -> None:
    """`facts`: what was analysed, under the title. All text is escaped."""
    parts = [f"<h1>{_safe(title)}</h1>", _table(("", ""), list(facts.items()), head=False)]
    parts += [f'<p class="warning"><b>Warning.</b> {_safe(text)}</p>' for text in warnings]
    parts += [] if warnings else ['<p class="good">No collapsed layer and no dead expert.</p>']
    links = "".join(f'<a href="#s{n}">{_safe(section.title)}</a>' for n, section in enumerate(sections))
    parts.append(f"<nav>{links}</nav>")
    for number, section in enumerate(sections):
        parts.append(f'<section id="s{number}"><h2>{_safe(section.title)}</h2>')
        parts += [f'<p class="note">{_safe(section.text)}</p>'] if section.text else []
        parts += [f"<figure>{_picture(picture)}</figure>" for picture in section.pictures]
        parts += [_table(head, rows) for head, rows in section.tables]
        parts.append("</section>")
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_safe(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n",
        encoding="utf-8",
    )


def _safe(text: object) -> str:
    return html.escape(str(text))


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{_safe(path.stem)}" src="data:image/png;base64,{data}">'


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], head: bool = True) -> str:
    first = "<tr>" + "".join(f"<th>{_safe(cell)}</th>" for cell in names) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{first}{body}</table>"
