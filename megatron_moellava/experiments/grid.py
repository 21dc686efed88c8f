"""A grid of runs as data: steps that a cell may change, and the nodes that come out of it.

A node is one step with one set of settings and one seed. Cells that agree up to a step share its node, because a node is
known by the digest of everything that decides its result: so a common prefix is trained once per seed, and what is
finished is never trained again. Free of torch.
"""

import copy
import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from megatron_moellava.config import ConfigError, read_yaml, set_override

KINDS = {
    "command": {"command"},
    "train": {"from", "stage", "steps", "data", "image_folder", "tokenizer", "teacher", "config", "set", "ask"},
    "upcycle": {"from", "moe", "noise_std", "router_scale", "drop", "select"},
    "given": {"folder"},
}
REFERENCES = ("from", "data", "image_folder", "tokenizer", "teacher")  # "step/below/it": needs the step
TOP = {
    "extends",
    "name",
    "title",
    "question",
    "baseline",
    "against",
    "seeds",
    "cells",
    "steps",
    "end",
    "metrics",
    "curves",
    "claims",
    "paper",
}
CLAIM = {"says", "better", "worse"}


@dataclass(frozen=True)
class Node:
    """One step with its settings. `references`: setting -> (node, path below its folder)."""

    step: str
    seed: int
    settings: dict
    references: dict[str, tuple["Node", str]] = field(default_factory=dict)
    files: tuple[str, ...] = ()  # contents of files that the settings name

    @cached_property
    def digest(self) -> str:
        """Changes with everything that the node's result depends on, the nodes before it included."""
        needs = {name: (node.digest, path) for name, (node, path) in self.references.items()}
        text = json.dumps([self.step, self.seed, self.settings, needs, self.files], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        """Of the node's folder."""
        return f"{self.step}-seed{self.seed}-{self.digest}"

    @property
    def kind(self) -> str:
        """What the node does: a key of KINDS."""
        return self.settings["kind"]

    def needs(self) -> list["Node"]:
        """The nodes whose results it reads, each once."""
        return list({node.name: node for node, _ in self.references.values()}.values())


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A declared grid. `cells`: name -> dotted changes of `steps`."""

    name: str
    title: str
    question: str
    baseline: str
    folder: Path  # {here} in the settings
    seeds: tuple[int, ...]
    cells: dict[str, dict]
    steps: dict[str, dict]
    end: str = ""  # the step whose result is a cell's, unless the cell says another; empty: the last
    against: dict[str, str] = field(default_factory=dict)  # cell -> what it is compared with, instead of the baseline
    metrics: tuple[str, ...] = ("accuracy",)
    curves: bool = False  # whether the report shows the loss of every step
    claims: tuple[dict, ...] = ()  # of the paper: {"says", "better": cell, "worse": cell}
    paper: dict = field(default_factory=dict)  # the paper's table: {"columns", "rows", "note"}

    def chain(self, cell: str, seed: int) -> list[Node]:
        """The nodes of a cell in their order; the last is its result."""
        steps = self._steps_of(cell)
        end = steps.pop("end", None) or self.end or list(steps)[-1]
        nodes: dict[str, Node] = {}
        self._add(end, steps, seed, nodes, cell)
        return list(nodes.values())

    def reference(self, cell: str) -> str | None:
        """The cell that this one is compared with; None for one that is nobody's variant."""
        other = self.against.get(cell, self.baseline)
        return None if other == cell else other

    def runs(self) -> list[tuple[str, int]]:
        """Every (cell, seed), cell by cell: the order of --list."""
        return [(cell, seed) for cell in self.cells for seed in self.seeds]

    def _steps_of(self, cell: str) -> dict:
        steps = copy.deepcopy(self.steps)
        for path, value in self.cells[cell].items():
            set_override(steps, path, copy.deepcopy(value))
        return steps

    def _add(self, step: str, steps: dict, seed: int, nodes: dict[str, Node], cell: str) -> Node:
        if step in nodes:
            return nodes[step]
        settings = dict(steps[step])
        references = {}
        for name in REFERENCES:
            target, _, below = str(settings.get(name, "")).partition("/")
            if target in steps:
                references[name] = (self._add(target, steps, seed, nodes, cell), below)
        ask = settings.get("ask")
        for name, value in (ask or {}).items():
            target, _, below = str(value).partition("/")
            if target in steps:
                references[f"ask.{name}"] = (self._add(target, steps, seed, nodes, cell), below)
        nodes[step] = Node(step, seed, settings, references, tuple(self._contents(settings)))
        return nodes[step]

    def _contents(self, settings: dict) -> Iterator[str]:
        if settings.get("config"):
            file = self.expand(settings["config"])
            if not file.is_file():
                raise ConfigError(
                    f"config {settings['config']} is no file: {file} ({{here}} is the folder of the grid)"
                )
            yield file.read_text()

    def expand(self, path: str) -> Path:
        """A path of the grid file, with {here} as the folder of the grid."""
        return Path(path.replace("{here}", str(self.folder)))


def load_grid(path: str | Path, *, seeds: Sequence[int] = (), steps_scale: float = 1.0) -> Grid:
    """A grid file, with what it extends. Raises ConfigError that lists every problem."""
    path = Path(path)
    tree = _extended(path)
    problems = [f"{path}: {problem}" for problem in _problems(tree)]
    if problems:
        raise ConfigError("\n".join(problems))
    for step in tree["steps"].values():
        if isinstance(step, dict) and step.get("kind") == "train":
            step["steps"] = scaled(step["steps"], steps_scale)
    cells = {name: _scaled(changes or {}, steps_scale) for name, changes in tree["cells"].items()}
    return Grid(
        name=tree.get("name", path.stem),
        title=tree.get("title", path.stem),
        question=tree.get("question", ""),
        baseline=tree["baseline"],
        folder=path.resolve().parent,
        seeds=tuple(seeds or tree.get("seeds", (1, 2, 3))),
        cells=cells,
        steps=tree["steps"],
        end=tree.get("end", ""),
        against=tree.get("against") or {},
        metrics=tuple(tree.get("metrics", ("accuracy",))),
        curves=bool(tree.get("curves", False)),
        claims=tuple(tree.get("claims") or ()),
        paper=tree.get("paper") or {},
    )


def _scaled(changes: dict, scale: float) -> dict:
    """A cell that asks for other numbers of steps asks for them before scaling."""
    return {name: scaled(value, scale) if name.endswith(".steps") else value for name, value in changes.items()}


def scaled(steps: int, scale: float) -> int:
    """At least two steps; 0 stays one epoch."""
    return max(2, round(steps * scale)) if steps else 0


def _extended(path: Path) -> dict:
    tree = read_yaml(str(path))
    if "extends" not in tree:
        return tree
    return _merged(_extended(path.parent / tree.pop("extends")), tree)


def _merged(base: dict, changes: dict) -> dict:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _problems(tree: dict) -> Iterator[str]:
    for key in tree.keys() - TOP:
        near = difflib.get_close_matches(key, TOP, n=2) or sorted(TOP)
        yield f"{key} is not known; did you mean {', '.join(near)}?"
    steps, cells = tree.get("steps"), tree.get("cells")
    if not isinstance(steps, dict) or not steps or not isinstance(cells, dict) or not cells:
        yield "a grid needs `steps` and `cells` (names with settings)"
        return
    for name, step in steps.items():
        yield from _step_problems(name, step)
    for cell, changes in cells.items():
        for change in changes or {}:
            if change != "end" and change.partition(".")[0] not in steps:
                yield f"cells.{cell}: {change} changes no step; steps are {', '.join(steps)}"
        end = (changes or {}).get("end")
        if end is not None and end not in steps:
            yield f"cells.{cell}.end={end} is no step; steps are {', '.join(steps)}"
    if tree.get("end") and tree["end"] not in steps:
        yield f"end={tree['end']} is no step; steps are {', '.join(steps)}"
    named = {
        "baseline": tree.get("baseline"),
        **{f"against.{cell}": other for cell, other in (tree.get("against") or {}).items()},
    }
    for number, claim in enumerate(tree.get("claims") or ()):
        if not isinstance(claim, dict) or claim.keys() != CLAIM:
            yield f"claims[{number}] needs {', '.join(sorted(CLAIM))}, and nothing else"
            continue
        named |= {f"claims[{number}].{side}": claim[side] for side in ("better", "worse")}
    for where, cell in named.items():
        if cell not in cells:
            yield f"{where}={cell!r} is no cell; cells are {', '.join(cells)}"


def _step_problems(name: str, step: object) -> Iterator[str]:
    kind = step.get("kind") if isinstance(step, dict) else None
    if kind not in KINDS:
        yield f"steps.{name}.kind={kind!r} must be one of {', '.join(KINDS)}"
        return
    assert isinstance(step, dict)
    if kind == "command":
        return  # its other keys fill {placeholders} of the command
    for key in step.keys() - KINDS[kind] - {"kind"}:
        yield f"steps.{name}.{key} is not known for kind={kind}; use {', '.join(sorted(KINDS[kind]))}"
    required = {"train": ("from", "stage", "steps", "data"), "upcycle": ("from",), "given": ("folder",)}[kind]
    for key in required:
        if key not in step:
            yield f"steps.{name}.{key} is required for kind={kind}"
