"""The design rules that a reviewer would otherwise have to remember, read from the sources themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import REPO

PACKAGE = REPO / "megatron_moellava"
SOURCES = sorted(PACKAGE.rglob("*.py"))
COMMANDS = sorted([*REPO.glob("tools/*.py"), *REPO.glob("examples/*/run.py")])

# An import may only go to a lower floor, or stay in its own room. Rooms on one floor never import each other.
FLOORS = (
    ("typed_tree", "machine"),
    ("config",),
    ("platform", "mapping", "stages", "placement", "routers", "hf_config"),
    ("checkpoint", "parallel"),
    ("backbones", "towers"),
    ("costs", "data"),
    ("validation",),
    ("model", "config_reference"),
    ("conversion", "routing"),
    ("training", "inference"),
    ("evaluation", "analysis", "planning", "verify", "serving"),
    ("experiments",),
    ("commands",),
    ("__main__",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Beyond the floors: data gets rank and world size as arguments, conversion works on plain tensors.
NEVER = {
    "data": ("megatron.core", "megatron_moellava.model", "megatron_moellava.parallel", "megatron_moellava.platform"),
    "conversion": ("megatron.core", "megatron_moellava.model"),
    "config": ("torch", "megatron.core"),
    "typed_tree": ("torch", "megatron.core"),
    "machine": ("torch", "megatron.core"),
    "validation": (
        "torch",
        "transformers",
        "megatron.core",
        "megatron_moellava.platform",
        "megatron_moellava.parallel",
    ),
    "stages": ("torch", "megatron.core"),
    "routers": ("torch", "megatron.core"),
    "mapping": ("torch", "megatron.core"),
    "costs": ("torch", "megatron.core"),
    "checkpoint": ("megatron.core",),
    "backbones": ("torch", "megatron.core"),
    "towers": ("torch", "megatron.core"),
}


def room_of(module: str) -> str | None:
    """megatron_moellava.mapping -> conversion.mapping; megatron_moellava.data.loader -> data."""
    inner = module.split(".")[1:]
    if not inner:
        return None
    pair = ".".join(inner[:2])
    return pair if pair in FLOOR_OF else inner[0]


def module_of(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> list[str]:
    """Full names of everything a file imports, also inside functions; `from a import b` gives a and a.b."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(above + ([base] if base else []))
            names += [base] + [f"{base}.{alias.name}" for alias in node.names]
    return names


def is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def test_every_module_has_a_floor():
    rooms = {room_of(module_of(path)) for path in SOURCES} - {None}
    assert rooms <= set(FLOOR_OF), f"say in FLOORS where these belong: {sorted(rooms - set(FLOOR_OF))}"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_point_downward(path):
    here = room_of(module_of(path))
    for name in imports_of(path):
        there = room_of(name) if is_in(name, "megatron_moellava") else None
        if here is None or there is None or there == here or there not in FLOOR_OF:
            continue
        assert FLOOR_OF[there] < FLOOR_OF[here], f"{module_of(path)} imports {name}: {there} is not below {here}"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_forbidden_imports_are_absent(path):
    for name in imports_of(path):
        for forbidden in NEVER.get(room_of(module_of(path)) or "", ()):
            assert not is_in(name, forbidden), f"{module_of(path)} must not import {forbidden}"


@pytest.mark.parametrize("path", [*SOURCES, *COMMANDS], ids=lambda path: str(path.relative_to(REPO)))
def test_only_platform_mentions_torch_cuda(path):
    if path.name == "platform.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        mentioned = isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda"
        assert not mentioned, f"{path.name}:{node.lineno} mentions torch.cuda"
    assert not any(is_in(name, "torch.cuda") for name in imports_of(path))


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_no_optional_imports_outside_platform(path):
    if path.name == "platform.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Try) and any(
            "ImportError" in ast.unparse(handler.type or node) for handler in node.handlers
        ):
            imports = [child for child in ast.walk(node) if isinstance(child, ast.Import | ast.ImportFrom)]
            assert not imports, f"{path.name}:{node.lineno} imports inside try"


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(REPO)))
def test_help_does_not_import_torch(path):
    """Importing torch costs seconds; --help has to answer at once."""
    code = f"""
import runpy, sys
sys.argv = [{str(path)!r}, "--help"]
sys.path.insert(0, {str(path.parent)!r})
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = [name for name in ("torch", "transformers", "megatron.core") if name in sys.modules]
sys.exit(f"--help imported {{heavy}}" if heavy else 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, timeout=120)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) > 3, "a help text says more than this"
