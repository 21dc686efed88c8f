"""The design rules that a reviewer would otherwise have to remember. A rule gets sources and returns its offenders."""

import ast
import re
from collections import defaultdict
from pathlib import Path

from tests.helpers.sources import PACKAGE, Source, bound_imports, dotted, in_module, literals

# An import may only go to a lower floor, or stay in its own room. Rooms on one floor never import each other.
FLOORS = (
    ("typed_tree", "machine", "exit_codes", "compiled"),
    ("config",),
    ("platform", "mapping", "stages", "placement", "routers", "hf_config"),
    ("checkpoint", "parallel"),
    ("backbones", "towers"),
    ("costs", "data"),
    ("validation",),
    ("model", "config_reference"),
    ("conversion", "routing"),
    ("training", "inference"),
    ("evaluation", "analysis", "planning", "serving", "doctor"),
    ("experiments", "verify"),
    ("commands",),
    ("__main__",),
)

# Beyond the floors: data gets rank and world size as arguments, conversion works on plain tensors, and whatever reads a
# configuration has to answer before torch could be imported.
FORBIDDEN = {
    "config": ("torch", "megatron.core"),
    "typed_tree": ("torch", "megatron.core"),
    "exit_codes": ("torch", "megatron.core", "yaml"),
    "machine": ("torch", "megatron.core"),
    "validation": ("torch", "transformers", "megatron.core", f"{PACKAGE}.platform", f"{PACKAGE}.parallel"),
    "stages": ("torch", "megatron.core"),
    "routers": ("torch", "megatron.core"),
    "mapping": ("torch", "megatron.core"),
    "placement": ("torch", "megatron.core"),
    "hf_config": ("torch", "megatron.core"),
    "checkpoint": ("megatron.core",),
    "backbones": ("torch", "megatron.core"),
    "towers": ("torch", "megatron.core"),
    "costs": ("torch", "megatron.core"),
    "data": ("megatron.core", f"{PACKAGE}.model", f"{PACKAGE}.parallel", f"{PACKAGE}.platform"),
    "conversion": ("megatron.core", f"{PACKAGE}.model"),
}

# Private to the eye, but documented parts of the standard library.
DOCUMENTED = {"_exit", "_current_frames", "_replace", "_asdict", "_fields", "_make"}
TABLE = "docs/reference/megatron_core.md"


def rooms_without_a_floor(sources: list[Source]) -> list[str]:
    floors = {room for floor in FLOORS for room in floor}
    return [
        f"{source.path}: say in FLOORS where {source.room} belongs"
        for source in sources
        if source.room and source.room not in floors
    ]


def rooms_that_do_not_exist(sources: list[Source]) -> list[str]:
    """Rules about a room that was renamed would hold for nothing."""
    rooms = {source.room for source in sources}
    named = {*FORBIDDEN, *(room for floor in FLOORS for room in floor)}
    named |= {name.split(".")[1] for names in FORBIDDEN.values() for name in names if in_module(name, PACKAGE)}
    return [f"a rule names {room}, which does not exist" for room in sorted(named - rooms)]


def imports_that_point_upward(sources: list[Source]) -> list[str]:
    floor_of = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    return [
        f"{source.path}:{item.line}: {source.room} imports {item.name}, which is not on a lower floor"
        for source in sources
        for item in source.imports
        for there in item.name.split(".")[1:2]
        if in_module(item.name, PACKAGE) and source.room in floor_of and there in floor_of
        if there != source.room and floor_of[there] >= floor_of[source.room]
    ]


def forbidden_imports(sources: list[Source]) -> list[str]:
    return [
        f"{source.path}:{item.line}: {source.room} must not import {forbidden}"
        for source in sources
        for item in source.imports
        for forbidden in FORBIDDEN.get(source.room, ())
        if in_module(item.name, forbidden)
    ]


def constants_with_two_homes(sources: list[Source]) -> list[str]:
    """The same name with the same value in two files, or one long string under two names."""
    homes = defaultdict(set)
    for source in sources:
        for name, value in literals(source).items():
            homes[name, value].add(source.path)
            homes["a constant", value] |= {source.path} if value[0] in "'\"" and len(value) > 12 else set()
    return [
        f"{name} = {value:.60} stands in {', '.join(sorted(paths))}; keep one and import it"
        for (name, value), paths in homes.items()
        if len(paths) > 1 and not (name != "a constant" and len(homes.get(("a constant", value), ())) > 1)
    ]


def optional_imports(sources: list[Source]) -> list[str]:
    """An import that may fail belongs into platform.py: elsewhere the product would do without and say nothing."""
    return [
        f"{source.at(node)}: imports inside try"
        for source in sources
        if source.rooms != ("platform",)
        for node in source.nodes
        if isinstance(node, ast.Try) and any(_catches_import_errors(handler) for handler in node.handlers)
        if any(isinstance(child, ast.Import | ast.ImportFrom) for item in node.body for child in ast.walk(item))
    ]


def _catches_import_errors(handler: ast.ExceptHandler) -> bool:
    caught = ast.unparse(handler.type) if handler.type else "Exception"
    return bool(set(re.findall(r"\w+", caught)) & {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"})


def device_choices(sources: list[Source]) -> list[str]:
    """torch.cuda, torch.device(...), a device by name, or a question for the kind of device."""
    offenders = []
    for source in sources:
        if source.rooms == ("platform",):
            continue
        offenders += [
            f"{source.path}:{item.line}: imports torch.cuda"
            for item in source.imports
            if in_module(item.name, "torch.cuda")
        ]
        offenders += [f"{source.at(node)}: {ast.unparse(node):.60}" for node in source.nodes if _chooses_device(node)]
    return offenders


def _chooses_device(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        kind = node.attr == "type" and isinstance(node.value, ast.Attribute) and node.value.attr == "device"
        return dotted(node) == "torch.cuda" or kind or node.attr == "is_cuda"
    if not isinstance(node, ast.Call):
        return False
    called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    given = [item.value for item in node.keywords if item.arg == "device"]
    given += node.args if called == "to" else []
    by_name = any(isinstance(item, ast.Constant) and _names_device(item.value) for item in given)
    return by_name or called == "cuda" or dotted(node.func) == "torch.device"


def _names_device(value: object) -> bool:
    return isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda")


def dangerous_calls(sources: list[Source]) -> list[str]:
    """trust_remote_code and a shell nowhere; torch.load with weights_only=True only; no unpickling, eval or exec."""
    return [
        f"{source.at(node)}: {danger}"
        for source in sources
        for node in source.nodes
        if isinstance(node, ast.Call)
        for danger in _dangers(node)
    ]


def _dangers(call: ast.Call) -> list[str]:
    options = {item.arg: getattr(item.value, "value", None) for item in call.keywords}
    called = ast.unparse(call.func)
    found = [f"{name} is not False" for name in ("trust_remote_code", "shell") if options.get(name, False) is not False]
    if called.endswith("torch.load") and options.get("weights_only") is not True:
        found.append("torch.load without weights_only=True")
    if called in ("pickle.load", "pickle.loads", "os.system", "eval", "exec"):
        found.append(called)
    return found


def edits_of_the_search_path(sources: list[Source]) -> list[str]:
    """Tests find each other by name: `tests.helpers.x`. A path added by one file would hide a fault of the next."""
    return [
        f"{source.at(node)}: edits sys.path"
        for source in sources
        for node in source.nodes
        if isinstance(node, ast.Attribute) and dotted(node) == "sys.path"
    ]


def public_names_without_a_docstring(sources: list[Source]) -> list[str]:
    """Classes and functions of a module; what a method does often follows from its class."""
    return [
        f"{source.at(node)}: {node.name} has no docstring"
        for source in sources
        for node in source.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if not _is_private(node.name) and not ast.get_docstring(node) and not _is_overload(node)
    ]


def _is_overload(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """One of several signatures, of which the function behind them has the docstring."""
    return any(isinstance(item, ast.Name) and item.id == "overload" for item in node.decorator_list)


def modules_without_a_test(sources: list[Source], root: Path, shared: dict[str, str]) -> list[str]:
    """a/b.py of the package is tested by a/test_b.py of tests/unit, or by what `shared` names for it or its folder."""
    offenders = [
        f"{module} shares {test}, which does not exist"
        for module, test in shared.items()
        if not (root / test).exists() or not (root / module).exists()
    ]
    for source in sources:
        if not source.rooms or source.path.endswith("__init__.py"):
            continue
        *folders, name = source.rooms
        expected = "/".join(["tests/unit", *folders, f"test_{name}.py"])
        if source.path not in shared and not (root / expected).exists():
            offenders.append(f"{source.path} has no {expected}")
    return offenders


def private_names(sources: list[Source]) -> dict[str, list[str]]:
    """{name: places} of what is not ours and may change without notice.

    Private names of other packages (imported, read, called, overridden), public ones that are replaced, and the modules
    whose source platform.py rewrites. A name is ours if the file defines it.
    """
    found = defaultdict(list)
    for source in sources:
        ours = {name for node in source.nodes for name in _defined(node)}
        bound = bound_imports(source)
        replaceable = {name for name, full in bound.items() if full.split(".")[0] in ("torch", "megatron")}
        ours |= {name for name, full in bound.items() if in_module(full, PACKAGE)}
        for node in source.nodes:
            for name in _touched(node, replaceable, ours):
                if name not in DOCUMENTED:
                    found[name].append(source.at(node))
    return found


def _defined(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    of_self = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and dotted(node.value) == "self"
    return [node.attr] if of_self else []


def _touched(node: ast.AST, replaceable: set[str], ours: set[str]) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        return [name for name in parts if _is_private(name) and not node.level and name not in ours]
    if isinstance(node, ast.Import):
        return [name for alias in node.names for name in alias.name.split(".") if _is_private(name)]
    if isinstance(node, ast.Attribute):
        if isinstance(node.ctx, ast.Store) and dotted(node).split(".")[0] in replaceable:
            is_switch = in_module(dotted(node), "torch.backends")  # documented, and made to be set
            return [] if is_switch else [node.attr]  # replaced, whether private or not
        by_super = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super"
        return [node.attr] if _is_private(node.attr) and (by_super or node.attr not in ours) else []
    if isinstance(node, ast.Tuple) and len(node.elts) == 3:  # (owner, "name", stand-in)
        owner, name, _ = node.elts
        replaced = dotted(owner).split(".")[0] in replaceable and isinstance(name, ast.Constant)
        return [name.value] if replaced and isinstance(name.value, str) else []
    if isinstance(node, ast.Dict):  # {"module": names in it that may be unpickled}, {"module": rewrites of its source}
        keys = [key.value if isinstance(key, ast.Constant) else "" for key in node.keys]
        modules = [(key, value) for key, value in zip(keys, node.values, strict=True) if _is_module(key)]
        strings = [item.value for _, value in modules for item in ast.walk(value) if isinstance(item, ast.Constant)]
        rewritten = [key for key, value in modules if isinstance(value, ast.List)]
        return [*(text for text in strings if re.fullmatch(r"_\w+", str(text))), *rewritten]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
        name = getattr(node.args[1], "value", None)
        return [name] if isinstance(name, str) and _is_private(name) and name not in ours else []
    return []


def _is_module(key: object) -> bool:
    return isinstance(key, str) and key.startswith(("torch.", "megatron."))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def table_rows(text: str) -> list[list[str]]:
    """[name, version, where, why, test] of each row of TABLE; a row is one whose name stands in backticks."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in line.strip("| ").split(" | ")] for line in lines]


def table_offenders(sources: list[Source], text: str) -> list[str]:
    """Differences between the names of others that `sources` touch and the rows of the table `text`."""
    found = private_names(sources)
    names = [name for name, *_ in table_rows(text)]
    rows = {name if name in found else name.rpartition(".")[2] for name in names}  # a whole module, or the last part
    return [
        *(f"{places[0]} touches {name}, which {TABLE} lacks" for name, places in found.items() if name not in rows),
        *(f"{TABLE} has {name}, which nothing touches" for name in sorted(rows - set(found))),
    ]
