"""The sources of a clone, each read and parsed once, as the rules of tests/helpers/rules.py look at them."""

import ast
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "megatron_moellava"


@dataclass(frozen=True)
class Import:
    name: str  # full name; `from a import b` gives a and a.b
    line: int


@dataclass(frozen=True)
class Source:
    path: str  # below the root, with slashes
    module: str  # megatron_moellava.data.loader
    nodes: tuple[ast.AST, ...]  # all of them, as ast.walk gives them
    body: tuple[ast.stmt, ...]  # the module's own statements
    imports: tuple[Import, ...]  # also those inside functions

    @property
    def rooms(self) -> tuple[str, ...]:
        """megatron_moellava/data/loader.py -> ("data", "loader"); () for what is not of the package."""
        return tuple(self.module.split(".")[1:]) if in_module(self.module, PACKAGE) else ()

    @property
    def room(self) -> str:
        return self.rooms[0] if self.rooms else ""

    def at(self, node: ast.AST) -> str:
        return f"{self.path}:{node.lineno}"


def in_module(name: str, module: str) -> bool:
    """Whether `name` is `module` or lies in it."""
    return name == module or name.startswith(module + ".")


def read_sources(root: Path, *patterns: str) -> list[Source]:
    """All files below `root` that match one of `patterns`, in alphabetical order."""
    paths = {path for pattern in patterns for path in root.glob(pattern)}
    return [read_source(root, path) for path in sorted(paths)]


def read_source(root: Path, path: Path) -> Source:
    relative = path.relative_to(root)
    parts = relative.with_suffix("").parts
    package = parts[:-1]
    module = ".".join(package if parts[-1] == "__init__" else parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tuple(ast.walk(tree))
    return Source(str(relative), module, nodes, tuple(tree.body), tuple(_imports(nodes, package)))


def _imports(nodes: tuple[ast.AST, ...], package: tuple[str, ...]):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield Import(base, node.lineno)
            yield from (Import(f"{base}.{alias.name}", node.lineno) for alias in node.names)


def literals(source: Source) -> dict[str, str]:
    """{NAME: repr of its value} of the module-level constants that are written down as literals."""
    found = {}
    for node in source.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        try:
            value = repr(ast.literal_eval(node.value))
        except ValueError:
            continue
        found |= {target.id: value for target in targets if isinstance(target, ast.Name)}
    return found


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute access that begins with a name, otherwise an empty string."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else ""


def bound_imports(source: Source) -> dict[str, str]:
    """{name in the file: full name of what it was imported from}."""
    bound = {}
    for node in source.nodes:
        if isinstance(node, ast.Import):
            bound |= {
                alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0]
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom) and not node.level:
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return bound
