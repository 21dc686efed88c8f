"""Nested plain data, as YAML and JSON give it, made into dataclasses. Problems are collected, so that a user sees all of them.

A field's type says what is legal: a dataclass, bool, int, float, str, Literal, tuple[X, ...], and unions of those.
"""

import dataclasses
import difflib
import types
import typing

_WRONG = object()  # what a value became that is not legal


def build(cls: type, tree: object, path: str = "") -> tuple[typing.Any, list[str]]:
    """(an instance of `cls`, problems): fields with a problem have their default; None where one without is wrong."""
    problems: list[str] = []
    value = _build(cls, tree, path, problems)
    return (None if value is _WRONG else value), problems


def _build(cls: type, tree: object, path: str, problems: list[str]):
    if not isinstance(tree, dict):
        problems.append(f"{path.rstrip('.')}={tree!r} must be a section with the fields of {cls.__name__}")
        return _WRONG
    known = {item.name: item for item in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in sorted(map(str, tree.keys() - known.keys())):
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or sorted(known)
        problems.append(f"{path}{key} is not a field; did you mean {', '.join(path + name for name in near)}?")
    values, complete = {}, True
    for name, item in known.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        value = _WRONG
        if name in tree:
            value = _convert(hints[name], tree[name], path + name, problems)
        elif required:
            problems.append(f"{path}{name} is required")
        if value is not _WRONG:
            values[name] = value
        elif required:
            complete = False
    return cls(**values) if complete else _WRONG


def _convert(hint, value, path: str, problems: list[str]):
    """`value` as the type `hint`, or _WRONG and a problem more."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(typing.get_args(hint), value, path, problems)
    if origin is typing.Literal:
        return _choice(typing.get_args(hint), value, path, problems)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, value, path + ".", problems)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        kind = typing.get_args(hint)[0]
        converted = [_convert(kind, item, f"{path}[{i}]", problems) for i, item in enumerate(items)]
        return _WRONG if _WRONG in converted else tuple(converted)
    converted = _scalar(hint, value)
    if converted is None:
        problems.append(f"{path}={value!r} must be of type {hint.__name__}")
        return _WRONG
    return converted


def _convert_union(options, value, path: str, problems: list[str]):
    if value is None and types.NoneType in options:
        return None
    options = [option for option in options if option is not types.NoneType]
    # `str | tuple[int, ...]`: a list is the tuple, anything else the other one
    is_list = isinstance(value, list | tuple)
    fitting = [option for option in options if (typing.get_origin(option) is tuple) == is_list]
    return _convert((fitting or options)[0], value, path, problems)


def _choice(options: tuple, value, path: str, problems: list[str]):
    """One of the `options`, as it is or as a command line spells it ("3" for 3)."""
    for option in options:
        if type(value) is not bool and str(value) == str(option):
            return option
    listed = [str(option) for option in options]
    near = difflib.get_close_matches(str(value), listed, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}? Use one of" if near else "use one of"
    problems.append(f"{path}={value!r} is not supported; {hint}: {', '.join(listed)}")
    return _WRONG


def _scalar(hint: type, value):
    """`value` if it is a `hint`, with the harmless conversions (1 -> 1.0, YAML's "1e-4" -> 1e-4); else None."""
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return None
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if hint is int and isinstance(value, bool):
        return None
    return value if isinstance(value, hint) else None
