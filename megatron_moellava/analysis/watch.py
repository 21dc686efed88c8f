"""A live picture of `routing.jsonl` in a terminal: a bar for each expert and layer, text and image side by side.

Plain ANSI. A bar's full width is twice the mean load, the mark in its middle the mean. Free of torch and numpy, so that it
starts at once.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_moellava.config import DataError

BLOCKS = " ▏▎▍▌▋▊▉█"
COLOURS = {"text": "36", "image": "35", "low": "33", "high": "31"}
LOW, HIGH = 0.25, 2.0  # times the mean load
CLEAR = "\x1b[2J\x1b[H"


def watch(folder: Path, *, follow: bool, interval: float, colour: bool, screens: int | None = None) -> None:
    """Draw the newest observation of a run; with `follow`, again at every new one, until `screens` are drawn."""
    file = find_log(folder)
    for drawn, records in enumerate(observations(file, interval) if follow else [read(file)], start=1):
        text = screen(records, width=shutil.get_terminal_size((100, 40)).columns, colour=colour)
        sys.stdout.write((CLEAR if follow and colour else "") + text + "\n")
        sys.stdout.flush()
        if drawn == screens:
            return


def find_log(folder: Path) -> Path:
    """The `routing.jsonl` of a run folder; DataError says where there are some instead."""
    file = folder if folder.suffix == ".jsonl" else folder / "routing.jsonl"
    if file.exists():
        return file
    below = [str(path.parent) for path in sorted(folder.glob("*/routing.jsonl"))] if folder.is_dir() else []
    hint = f"give one of {', '.join(below)}" if below else "give the checkpoint.save folder of a run with experts"
    raise DataError(f"{file} does not exist; {hint}")


def read(file: Path) -> list[dict]:
    """Every complete line; a run may be writing the last one."""
    lines = file.read_text().split("\n")[:-1]
    records = [json.loads(line) for line in lines if line]
    return [record for record in records if record.get("layers")]


def observations(file: Path, interval: float) -> Iterator[list[dict]]:
    """All records of the file, again each time there are more; never ends. `interval`: seconds between looks."""
    seen = -1
    while True:
        records = read(file)
        if len(records) != seen:
            seen = len(records)
            yield records
        time.sleep(interval)


def screen(records: list[dict], *, width: int, colour: bool) -> str:
    """The newest record as text."""
    if not records:
        return "no observation yet; a run writes one every logging.routing_interval steps"
    record = records[-1]
    lines = [
        f"step {record['iteration']}   {record['num_experts']} experts, top-{record['topk']}   "
        f"load of each expert: bars end at twice the mean, | is the mean"
    ]
    bar = max(8, (width - 44) // len(_modalities(record)))
    for layer in record["layers"]:
        lines += ["", _head(layer), *_experts(layer, _modalities(record), record["num_experts"], bar, colour)]
    types = sorted({name for layer in record["layers"] for name in layer["groups"] if name.startswith("type:")})
    lines += ["", *(_by_type(record, name) for name in types)] if types else []
    recent = [(entry["iteration"], text) for entry in records for text in entry.get("warnings", ())][-3:]
    lines += [_painted(f"step {step} warning: {text}", "high", colour) for step, text in recent]
    return "\n".join(lines)


def _head(layer: dict) -> str:
    dropped, asked = sum(layer["dropped"]), sum(layer["choices"]) + sum(layer["dropped"])
    parts = [
        f"layer {layer['layer']:<3} entropy {layer['entropy']:.2f}",
        f"confidence {layer['top1']:.2f}, {layer['top2']:.2f}",
        f"busiest {layer['max_load']:.2f} x",
    ]
    parts += [f"aux {layer['load_balancing_loss']:.3f}"] if layer.get("load_balancing_loss") else []
    parts += [f"dropped {dropped / asked:.1%}"] if dropped else []
    return " | ".join(parts)


def _modalities(record: dict) -> list[str]:
    """Text, image, and the groups of further modalities."""
    groups = [name for layer in record["layers"] for name in layer["groups"] if not name.startswith("type:")]
    return [*dict.fromkeys(("text", "image", *groups))]


def _experts(layer: dict, modalities: Sequence[str], experts: int, bar: int, colour: bool) -> list[str]:
    lines = []
    for expert in range(experts):
        cells = []
        for name in modalities:
            choices = layer["groups"].get(name, {}).get("choices", [0] * experts)
            load = choices[expert] * experts / max(sum(choices), 1)
            kind = "low" if load < LOW else "high" if load > HIGH else name if name in COLOURS else "image"
            cells.append(f"{name} {_painted(_bar(load / 2, bar), kind, colour)} {load / experts:4.0%}")
        lines.append(f"  expert {expert:<3} " + "   ".join(cells))
    return lines


def _bar(share: float, width: int) -> str:
    """`share` of `width` in eighths of a cell, with the mark of the mean in the middle."""
    eighths = round(min(share, 1.0) * width * 8)
    text = "█" * (eighths // 8) + (BLOCKS[eighths % 8] if eighths < width * 8 else "")
    padded = list(text.ljust(width))
    if padded[width // 2] == " ":
        padded[width // 2] = "|"
    return "".join(padded)


def _by_type(record: dict, name: str) -> str:
    """Where the text of one question type goes: its busiest expert in each layer."""
    cells = []
    for layer in record["layers"]:
        choices = layer["groups"].get(name, {}).get("choices")
        if choices and sum(choices):
            best = max(range(len(choices)), key=choices.__getitem__)
            cells.append(f"layer {layer['layer']}: expert {best} {choices[best] / sum(choices):.0%}")
    return f"{name.removeprefix('type:'):<18} " + ", ".join(cells)


def _painted(text: str, kind: str, colour: bool) -> str:
    return f"\x1b[{COLOURS[kind]}m{text}\x1b[0m" if colour else text
