"""One thing that was looked at, and the page that all of them make."""

import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "note", "problem"]
MARKS: dict[Level, str] = {"ok": " ", "note": "·", "problem": "!"}
WIDTH = 120
_NAME = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What was found, and what it means for a run; a problem keeps runs from working."""

    part: str  # heading on the page
    name: str
    found: str
    meaning: str = ""
    level: Level = "ok"


def works(findings: Iterable[Finding]) -> bool:
    """Whether a run would work here, as far as was looked."""
    return all(finding.level != "problem" for finding in findings)


def page(findings: list[Finding]) -> str:
    """All findings as text, by part, problems marked with `!`; the last line is the verdict."""
    lines: list[str] = []
    for part in dict.fromkeys(finding.part for finding in findings):
        lines += ["", part]
        for finding in (one for one in findings if one.part == part):
            text = f"{finding.found}: {finding.meaning}" if finding.meaning else finding.found
            first = f"{MARKS[finding.level]} {finding.name:<{_NAME}}"
            lines += textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first))
    problems = [finding for finding in findings if finding.level == "problem"]
    named = ", ".join(finding.name for finding in problems)
    verdict = f"{len(problems)} problem(s): {named}; runs will not work before they are mended" if problems else ""
    return "\n".join([*lines[1:], "", verdict or "no problem found: runs work here"])


def as_data(findings: list[Finding]) -> dict:
    """The same for a program."""
    return {"works": works(findings), "findings": [asdict(finding) for finding in findings]}
