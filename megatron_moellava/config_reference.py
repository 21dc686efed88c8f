"""docs/reference/configuration.md, made of config.py: `python -m megatron_moellava.config_reference > FILE`.

A field's meaning is the comment beside or above it, its type says which values it may have, and what a number may be
stands in validation/numbers.py; so the page cannot say anything else than the program.
"""

import ast
import dataclasses
import inspect
import io
import re
import tokenize
import types
import typing

from megatron_moellava import config
from megatron_moellava.validation.numbers import RULES

INTRODUCTION = """# Configuration

A run is one tree of settings. A field is set in the YAML file of `--config` or on the command line, which wins:

```yaml
training: {stage: 3, train_steps: 5000}
parallel: {expert_model_parallel_size: 4}
```

```bash
moellava train --config run.yaml optimizer.lr=2e-5 data.seq_length=4096
```

The whole run, files included, is checked before a weight is touched, and all mistakes are reported together: an unknown
field, a wrong type and a value that is not listed name the nearest. `--validate-only` stops there, after less than two
seconds.

Where Megatron-Core has the field, it has Megatron-Core's name. This page is made of `megatron_moellava/config.py`
(`make docs`).
"""
# Comments are Python's, the page is about YAML.
YAML_WORDS = {"None": "null", "True": "true", "False": "false"}


def main() -> None:
    """Print the page."""
    print(page(), end="")


def page() -> str:
    """The whole page as Markdown."""
    meanings = comments(inspect.getsource(config))
    parts = [INTRODUCTION]
    for section, hint in typing.get_type_hints(config.RunConfig).items():
        parts += [f"## {section}", inspect.getdoc(_dataclass(hint)) or "", _table(section, _dataclass(hint), meanings)]
        if section == "moe":
            groups = _table("moe.expert_groups", config.ExpertGroups, meanings)
            parts += ["## moe.expert_groups", inspect.getdoc(config.ExpertGroups) or "", groups]
    parts += ["## data.sources", inspect.getdoc(config.Source) or "", _table("", config.Source, meanings)]
    parts += ["## data.modalities", inspect.getdoc(config.Modality) or "", _table("", config.Modality, meanings)]
    parts += [inspect.getdoc(config.Channel) or "", _table("", config.Channel, meanings)]
    lora = _table("training.lora", config.LoraConfig, meanings)
    parts += ["## training.lora", inspect.getdoc(config.LoraConfig) or "", lora]
    distillation = _table("training.distillation", config.DistillationConfig, meanings)
    parts += ["## training.distillation", inspect.getdoc(config.DistillationConfig) or "", distillation]
    debug = _table("training.debug", config.DebugConfig, meanings)
    parts += ["## training.debug", inspect.getdoc(config.DebugConfig) or "", debug]
    parts += ["## optimizer.roles", inspect.getdoc(config.RolesConfig) or "", _table("", config.RolesConfig, meanings)]
    parts += [inspect.getdoc(config.RoleOptions) or "", _table("optimizer.roles.tower", config.RoleOptions, meanings)]
    rows = [f"| `{old}` | `{new}`{_values(old)} |" for old, new in config.RENAMED.items()]
    parts += [
        "## Old spellings",
        "Read with a note, in checkpoints silently.",
        "\n".join(["| old | now |", "|---|---|", *rows]),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _values(old: str) -> str:
    changed = config.RENAMED_VALUES.get(old, {})
    listed = ", ".join(f"`{before}` is `{_value(after)}`" for before, after in changed.items())
    return f" ({listed})" if listed else ""


def _table(section: str, cls: type, meanings: dict[tuple[str, str], str]) -> str:
    hints = typing.get_type_hints(cls)
    rows = ["| field | values | default | |", "|---|---|---|---|"]
    for item in dataclasses.fields(cls):
        _, rule = RULES.get(f"{section}.{item.name}", (None, ""))
        meaning = next(
            (meanings[owner.__name__, item.name] for owner in cls.__mro__ if (owner.__name__, item.name) in meanings),
            "",
        )
        cells = (f"`{item.name}`", _kind(hints[item.name]), _default(item), "; ".join(filter(None, (meaning, rule))))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _dataclass(hint) -> type:
    """The section's class of `MoEConfig | None`, or of the class itself."""
    options = typing.get_args(hint) or (hint,)
    return next(option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option))


def _kind(hint) -> str:
    """A type in words: its legal values, where they are few."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("`null`" if option is types.NoneType else _kind(option) for option in options)
    if origin is typing.Literal:
        return ", ".join(f"`{option}`" for option in options)
    if origin is tuple:
        return f"list of {_kind(options[0])}"
    words = {
        bool: "`true`, `false`",
        int: "whole number",
        float: "number",
        str: "text",
        config.Source: "sources (below)",
        config.Modality: "modalities (below)",
        config.Channel: "channels (below)",
        config.ExpertGroups: "groups of experts (below)",
        config.LoraConfig: "adapters (below)",
        config.DistillationConfig: "a teacher (below)",
        config.DebugConfig: "switches (below)",
        config.RolesConfig: "parts of the model (below)",
        config.RoleOptions: "rates and weight decay (below)",
    }
    return words[hint]


def _default(item: dataclasses.Field) -> str:
    return "required" if item.default is dataclasses.MISSING else f"`{_value(item.default)}`"


def _value(value) -> str:
    """As YAML has it."""
    words = {None: "null", True: "true", False: "false", "": '""', (): "[]"}
    return words[value] if isinstance(value, bool) or value in (None, "", ()) else str(value)


def comments(source: str) -> dict[tuple[str, str], str]:
    """{(class, field): comment} of a module's annotated class fields: beside the field, else the lines directly above it."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = {
        token.start[0]: (token.string.lstrip("# ").strip(), token.line[: token.start[1]].strip() == "")
        for token in tokens
        if token.type == tokenize.COMMENT
    }
    meanings = {}
    for cls in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for node in cls.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                comment = _comment(found, node.lineno, node.end_lineno or node.lineno)
                meanings[cls.name, node.target.id] = re.sub(r"\b(None|True|False)\b", _yaml_word, comment)
    return meanings


def _yaml_word(found: re.Match) -> str:
    return YAML_WORDS[found[0]]


def _comment(found: dict[int, tuple[str, bool]], first: int, last: int) -> str:
    beside = [found[line][0] for line in range(first, last + 1) if line in found]
    above: list[str] = []
    line = first - 1
    while line in found and found[line][1]:  # a comment with a line of its own
        above.insert(0, found[line][0])
        line -= 1
    return " ".join(above + beside)


if __name__ == "__main__":
    main()
