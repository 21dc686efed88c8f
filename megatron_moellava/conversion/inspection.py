"""What is in a checkpoint, as a table, and how two of them differ. Reads Megatron checkpoints and Hugging Face folders."""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron_moellava.backbones import BACKBONES
from megatron_moellava.checkpoint.folders import newest_checkpoint
from megatron_moellava.checkpoint.sums import verify_sums
from megatron_moellava.config import CheckpointError, LoraConfig, MoELlavaError, ProjectorMoEConfig, from_dict
from megatron_moellava.conversion import original
from megatron_moellava.conversion.huggingface import moe_config as moe_of_transformers
from megatron_moellava.conversion.huggingface import text_backbone
from megatron_moellava.conversion.imports import as_megatron, detect, named
from megatron_moellava.conversion.layout import LANGUAGE_MODEL, Layout
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from megatron_moellava.conversion.readers import open_huggingface
from megatron_moellava.conversion.recipes import Tensors
from megatron_moellava.conversion.tensors import Files, Tensor
from megatron_moellava.conversion.writers import METADATA_FILES
from megatron_moellava.costs.adapters import adapter_tensors
from megatron_moellava.costs.parameters import activated_parameters, token_flops, whole_parameters
from megatron_moellava.costs.shapes import UNUSED, Model, ModelTensor, model_tensors
from megatron_moellava.hf_config import read_json
from megatron_moellava.stages import LANGUAGE as LANGUAGE_ROLES

STAGES = {
    0: "start of stage 1",
    1: "stage 1: projector",
    2: "stage 2: projector + language model",
    3: "stage 3: MoE",
    4: "stage 4: preferences",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Counts of one model. `total` and `activated` are of the language model, as the papers count: no tower, no projector."""

    total: int
    activated: int  # what one token passes through: top-k of the experts
    tower: int
    projector: int
    activated_tower: int  # what one row of the tower passes through, and below one visual token
    activated_projector: int


def count_parameters(model: Model) -> Parameters:
    """From the sizes alone; activated = total without the experts that a token does not use."""
    whole, activated = whole_parameters(model), activated_parameters(model)
    return Parameters(
        total=sum(whole[role] for role in LANGUAGE_ROLES),
        activated=sum(activated[role] for role in LANGUAGE_ROLES),
        tower=whole["tower"],
        projector=whole["projector"],
        activated_tower=activated["tower"],
        activated_projector=activated["projector"],
    )


def inspect(path: Path, *, verify: bool = True) -> str:
    """The table of a checkpoint or a Hugging Face folder, as text. `verify`: first compare its files with their digests."""
    if not _is_megatron(Path(path)):
        verify_sums(Path(path), verify=verify)
        tensors = open_huggingface(Path(path))
        head = [f"{path}: {detect(tensors).title}", *_config_lines(Path(path), detect(tensors))]
        return "\n".join([*head, "", *_table(tensors, lambda name: ""), "", _totals(tensors)])
    source = open_checkpoint(path, verify=verify, adapter=True)
    shapes = model_tensors(source.model)
    if source.run.adapter is not None:
        shapes |= adapter_tensors(source.model, from_dict(LoraConfig, source.run.adapter["lora"]))
    lines = [
        f"{source.folder}",
        f"  stage        {STAGES.get(source.run.stage or 0, source.run.stage)}, iteration {source.run.iteration}",
        *model_lines(source.model),
        *_adapter_lines(source.run.adapter),
        *_provenance_lines(source.run.provenance),
        "",
        *_table(source.tensors, partial(_parallel, tensors=shapes)),
        "",
        _totals(source.tensors),
    ]
    return "\n".join(lines)


def _config_lines(path: Path, layout: Layout) -> list[str]:
    """The model that a folder's config.json describes, or why it is none of ours; nothing for a file of tensors alone."""
    if not (path / "config.json").exists():
        return []
    try:
        config = read_json(path)
        backbone = named(text_backbone(config, path.name), path.name)
        moe = original.moe_config(config) or moe_of_transformers(config, backbone)
        return model_lines(Model(backbone=backbone, tower=original.tower_of(config, layout, None), moe=moe))
    except MoELlavaError as error:
        return [f"  config.json  {str(error).splitlines()[0]}"]


def _is_megatron(path: Path) -> bool:
    """Whether `path` is one, or what an interrupted copy has left of one."""
    left = (path / METADATA_FILES[0]).exists() or any(path.glob("iter_*"))
    return not path.is_file() and (newest_checkpoint(path) is not None or left)


def model_lines(model: Model) -> list[str]:
    """Backbone, tower, experts, parameters and computation of a model, a line each: `  name         value`."""
    counts = count_parameters(model)
    backbone, family = model.backbone, model.backbone.hf.family
    size = f"{backbone.num_layers} layers of width {backbone.hidden_size}, no published size"
    lines = [f"  backbone     {f'{backbone.name} ({family})' if backbone.name in BACKBONES else f'{family}: {size}'}"]
    if model.tower:
        lines.append(f"  tower        {model.tower.name}, {model.tower.num_features} visual tokens")
    for branch in model.branches:
        tower, own = branch.seen_by(model.required_tower), "own" if branch.own_projector else "shared"
        shared = "" if branch.tower else " (shared)"
        lines.append(
            f"  {branch.modality:<12} {tower.name}{shared}, {tower.num_features} visual tokens, {own} projector"
        )
    if model.moe:
        moe = model.moe
        lines.append(
            f"  MoE          {moe.num_moe_experts} experts, top-{moe.moe_router_topk}, layers "
            f"{', '.join(map(str, model.moe_layers))}"
            + (
                f", each {moe.moe_ffn_hidden_size} wide ({model.backbone.ffn_hidden_size})"
                if moe.moe_ffn_hidden_size
                else ""
            )
            + (", residual" if moe.use_residual else "")
        )
    if model.tower_moe:
        layers = ", ".join(map(str, model.tower_moe_layers))
        lines.append(f"  tower MoE    {_experts(model.tower_moe)}, layers {layers}")
    if model.projector_moe:
        lines.append(f"  projector    {_experts(model.projector_moe)}")
    lines.append(
        f"  parameters   language model {_count(counts.total)}, activated per token {_count(counts.activated)}"
        + (
            f"; tower {_of_two(counts.tower, counts.activated_tower)}, "
            f"projector {_of_two(counts.projector, counts.activated_projector)}"
            if model.tower
            else ""
        )
    )
    lines.append(f"  computation  {token_flops(model) / 1e9:.3g} GFLOPs per token forward, attention's scores apart")
    return lines


def _adapter_lines(adapter: dict | None) -> list[str]:
    if adapter is None:
        return []
    lora, base = adapter["lora"], adapter["base"]
    named = f"{base['folder']} (seal {base['seal'][:12]})"
    return [f"  adapter      rank {lora['rank']}, alpha {lora['alpha']:g}", f"  base         {named}"]


def _provenance_lines(provenance: dict) -> list[str]:
    lines, depth = [], 0
    while provenance:
        words = [f"{key} {value}" for key, value in provenance.items() if isinstance(value, str | int | float)]
        lines.append(f"  {'provenance' if not depth else '':<12} {'  ' * depth}{', '.join(words)}")
        for why, names in (provenance.get("dropped") or {}).items():
            lines.append(f"  {'':<12} {'  ' * depth}left out {len(names)} tensors: {why}")
        provenance, depth = provenance.get("parent") or {}, depth + 1
    return lines


def _of_two(total: int, activated: int) -> str:
    return _count(total) if total == activated else f"{_count(total)} ({_count(activated)} activated)"


def _experts(moe: ProjectorMoEConfig) -> str:
    return f"{moe.num_moe_experts} experts, top-{moe.moe_router_topk}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number:,}"


def _parallel(name: str, tensors: dict[str, ModelTensor]) -> str:
    """Which axis of a tensor each parallel group divides: "EP 0, ETP 1", "TP 0", or "copied"."""
    if name not in tensors:
        return "rides along"
    tensor, axes = tensors[name], []
    if tensor.is_expert:
        axes.append("EP 0")
    if tensor.split is not None:
        axes.append(f"{'ETP' if tensor.is_expert else 'TP'} {tensor.split}")
    return ", ".join(axes) or "copied"


def _table(tensors: Tensors, layout: Callable[[str], str]) -> list[str]:
    """One line for tensors that differ in the layer (or the expert) only: `layers.0-31`."""
    groups: dict[tuple, list[str]] = {}
    for name, tensor in tensors.items():
        key = (re.sub(r"\.\d+\.", ".*.", name), tensor.shape, tensor.dtype, layout(name))
        groups.setdefault(key, []).append(name)
    rows = [("tensor", "shape", "dtype", "parallel", "MB")]
    for (pattern, shape, dtype, parallel), names in groups.items():
        size = sum(tensors[name].nbytes for name in names) / 1e6
        rows.append((_numbered(pattern, names), "x".join(map(str, shape)), dtype, parallel, f"{size:,.1f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return [
        "  ".join(
            cell.rjust(width) if column == 4 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _numbered(pattern: str, names: list[str]) -> str:
    """`layers.*.mlp` with the numbers that `names` have in the place of each star."""
    numbers = [re.findall(r"(?<=\.)\d+(?=\.)", name) for name in names]
    for place in range(pattern.count("*")):
        pattern = pattern.replace("*", _ranges(sorted({int(found[place]) for found in numbers})), 1)
    return pattern


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"; [0, 2, 4, 6] -> "0,2,..,6"."""
    if len(numbers) > 3 and len(steps := {b - a for a, b in itertools.pairwise(numbers)}) == 1:
        return f"{numbers[0]}-{numbers[-1]}" if steps == {1} else f"{numbers[0]},{numbers[1]},..,{numbers[-1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _totals(tensors: Tensors) -> str:
    elements, size = sum(t.numel for t in tensors.values()), sum(t.nbytes for t in tensors.values())
    return f"{len(tensors)} tensors, {elements:,} elements, {size / 1e9:,.3f} GB"


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which two checkpoints differ."""

    name: str
    what: str


def diff(
    first: Path,
    second: Path,
    *,
    verify: bool = True,
    progress: Callable[[int], object] = lambda count: None,
    begin: Callable[[int], object] = lambda total: None,
) -> tuple[list[Difference], int]:
    """All differences of two checkpoints or folders, and how many tensors are bit-identical.

    `verify`: first compare the files of each with their digests. Two layouts are compared by Megatron's names and pieces.
    Raises CheckpointError for a folder of another layout that could not be imported.
    """
    left, right = _open(Path(first), verify), _open(Path(second), verify)
    layouts = _layout_name(Path(first), left), _layout_name(Path(second), right)
    if layouts[0] != layouts[1]:
        said = f"{first} is {layouts[0]} and {second} is {layouts[1]}"
        tower = next((str(path) for path in (first, second) if _is_megatron(Path(path))), None)
        left, right = (_in_one_form(Path(path), part, tower, said) for path, part in ((first, left), (second, right)))
    begin(sum(tensor.nbytes for tensor in left.values()))
    found = [Difference(name, f"only in {first}") for name in left.keys() - right.keys()]
    found += [Difference(name, f"only in {second}") for name in right.keys() - left.keys()]
    same = 0
    with Files() as files, Files() as others:
        for name in sorted(left.keys() & right.keys()):
            what = _compare(_once(left[name]), _once(right[name]), files, others)
            progress(left[name].nbytes)
            same += not what
            if what:
                found.append(Difference(name, what))
    return sorted(found, key=lambda item: item.name), same


def _in_one_form(path: Path, tensors: Tensors, tower: str | None, said: str) -> dict[str, Tensor]:
    """Megatron's tensors, less what no feature needs: an import takes those along, and a run that trains may not have them.

    `tower`: the checkpoint that says which tower it is, where a folder's config has a name only.
    """
    try:
        found = (
            dict(tensors)
            if _is_megatron(path)
            else as_megatron(path, None if detect(tensors) is LANGUAGE_MODEL else tower)
        )
    except MoELlavaError as error:
        raise CheckpointError(
            f"{said}, so they are compared as an import of {path} would be, which cannot be: {error}"
        ) from error
    return {name: tensor for name, tensor in found.items() if not name.startswith(UNUSED)}


def _once(tensor: Tensor) -> Tensor:
    """A tensor that is made when it is read, made: it is read a few rows at a time."""
    if tensor.make is None:
        return tensor
    value = tensor.make()
    return replace(tensor, make=lambda: value)


def _layout_name(path: Path, tensors: Tensors) -> str:
    return "a Megatron checkpoint" if _is_megatron(path) else f"in the layout of {detect(tensors).title}"


def _open(path: Path, verify: bool) -> dict[str, Tensor]:
    if _is_megatron(path):
        return open_checkpoint(path, verify=verify, adapter=True).tensors
    verify_sums(path, verify=verify)
    return open_huggingface(path)


def _compare(one: Tensor, other: Tensor, files: Files, others: Files) -> str:
    """How two tensors differ; empty when they are bit-identical."""
    if one.shape != other.shape:
        return f"shape {list(one.shape)} against {list(other.shape)}"
    if one.dtype != other.dtype:
        return f"dtype {one.dtype} against {other.dtype}{_largest(one, other, files, others)}"
    identical = all(left == right for left, right in _pairs(one, other, files, others))
    return "" if identical else f"values{_largest(one, other, files, others)}"


def _largest(one: Tensor, other: Tensor, files: Files, others: Files) -> str:
    import torch

    largest, scale = 0.0, 0.0
    for left, right in _pairs(one, other, files, others):
        a = torch.frombuffer(left, dtype=getattr(torch, one.dtype)).double()
        b = torch.frombuffer(right, dtype=getattr(torch, other.dtype)).double()
        largest = max(largest, (a - b).abs().max().item())
        scale = max(scale, a.abs().max().item())
    return f", largest difference {largest:.3g} (largest value {scale:.3g})"


def _pairs(one: Tensor, other: Tensor, files: Files, others: Files) -> Iterator[tuple[memoryview, memoryview]]:
    """The same rows of both, a few at a time."""
    rows = one.shape[0] if one.shape else 1
    width = one.numel // max(rows, 1)
    step = max(1, (1 << 20) // max(1, width * 8))
    for row in range(0, rows, step):
        count = min(step, rows - row) * width
        left = b"".join(bytes(block) for block in files.blocks(one, row * width, count))
        right = b"".join(bytes(block) for block in others.blocks(other, row * width, count))
        yield memoryview(bytearray(left)), memoryview(bytearray(right))
