"""The strict engine: recipes say which source elements make each target tensor; `check` proves that nothing is lost,
doubled or of the wrong shape before a byte is written; `stream` then copies.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_moellava.config import CheckpointError
from megatron_moellava.conversion.layout import Entry
from megatron_moellava.conversion.tensors import ITEM_SIZES, Files, Tensor, uncovered
from megatron_moellava.mapping import Shape

Tensors = Mapping[str, Tensor]
Edit = Callable[[Any], Any]  # torch.Tensor (one block, flat) -> torch.Tensor of the same length


@dataclass(frozen=True, slots=True)
class Part:
    """`count` elements of a source tensor from `start` on. An `edit` sees them block by block, in order.

    `columns` (first, end): only these columns of the rows from `start` on; every block then holds whole rows.
    """

    source: str
    start: int
    count: int
    edit: Edit | None = None
    columns: tuple[int, int] | None = None

    def reach(self, tensor: Tensor) -> int:
        """Elements of the source from `start` to the end of what the part reads."""
        if self.columns is None:
            return self.count
        return self.count // (self.columns[1] - self.columns[0]) * tensor.columns


@dataclass(frozen=True, slots=True)
class Recipe:
    """One target tensor: its parts, one behind the other. `cast`: the dtype to convert every block to."""

    name: str
    shape: Shape
    dtype: str
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the target tensor."""
        return sum(part.count for part in self.parts) * ITEM_SIZES[self.dtype]


def import_recipes(entries: Iterable[Entry], tensors: Tensors, dtype: str | None = None) -> list[Recipe]:
    """Megatron tensors from a layout's. `dtype`: convert to it; None keeps each tensor's own."""
    recipes = []
    for entry in entries:
        parts = tuple(Part(entry.names[span.tensor], span.start, span.count) for span in entry.spans)
        recipes.append(Recipe(entry.megatron, entry.shape, dtype or _dtype(parts, tensors), parts))
    return recipes


def export_recipes(entries: Iterable[Entry], tensors: Tensors, dtype: str | None = None) -> list[Recipe]:
    """A layout's tensors from Megatron's: the same spans, sorted by their place on the other side."""
    recipes = []
    for entry in entries:
        parts: dict[int, list[tuple[int, Part]]] = defaultdict(list)
        position = 0
        for span in entry.spans:
            parts[span.tensor].append((span.start, Part(entry.megatron, position, span.count)))
            position += span.count
        for number, (name, shape) in enumerate(zip(entry.names, entry.shapes, strict=True)):
            ordered = tuple(part for _, part in sorted(parts[number], key=lambda item: item[0]))
            recipes.append(Recipe(name, shape, dtype or _dtype(ordered, tensors), ordered))
    return recipes


def _dtype(parts: tuple[Part, ...], tensors: Tensors) -> str:
    """Of the first part that exists; `check` reports the missing ones and the mixed ones."""
    return next((tensors[part.source].dtype for part in parts if part.source in tensors), "float32")


def identity(name: str, tensor: Tensor, target: str | None = None) -> Recipe:
    """The whole of a tensor, unchanged."""
    return Recipe(target or name, tensor.shape, tensor.dtype, (Part(name, 0, tensor.numel),))


def check(
    recipes: list[Recipe],
    tensors: Tensors,
    *,
    what: str,
    expected: Mapping[str, Shape] | None = None,
    dropped: Iterable[str] = (),
    copies: bool = False,
) -> None:
    """CheckpointError that lists every missing, left-over, doubled, cut or misshapen tensor; silence if all is well.

    `expected`: shapes that source tensors must have. `dropped`: source tensors that are left out on purpose.
    `copies`: a source element may be used more than once (upcycling).
    """
    problems = _missing(recipes, tensors) + _misshapen(recipes, tensors, expected or {})
    used: dict[str, list[tuple[int, int]]] = defaultdict(list)
    cuts: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for recipe in recipes:
        for part in recipe.parts:
            if part.source in tensors:
                used[part.source].append((part.start, part.start + part.reach(tensors[part.source])))
            if part.columns is not None:
                cuts[part.source].add(part.columns)
    for name, tensor in tensors.items():
        if name in used:
            problems += _coverage(name, tensor, used[name], copies) + _columns(name, tensor, cuts.get(name, set()))
        elif name not in set(dropped):
            problems.append(f"  {name} {list(tensor.shape)}: nothing uses it")
    if problems:
        raise CheckpointError(f"{what} is not what its config says ({len(problems)} problems):\n" + "\n".join(problems))


def _missing(recipes: list[Recipe], tensors: Tensors) -> list[str]:
    absent = {part.source: recipe.name for recipe in recipes for part in recipe.parts if part.source not in tensors}
    doubled = {recipe.name for recipe in recipes if sum(other.name == recipe.name for other in recipes) > 1}
    problems = [f"  {source}: missing (needed for {target})" for source, target in absent.items()]
    return problems + [f"  {name}: would be produced twice" for name in sorted(doubled)]


def _misshapen(recipes: list[Recipe], tensors: Tensors, expected: Mapping[str, Shape]) -> list[str]:
    problems = [
        f"  {name}: shape {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != tuple(shape)
    ]
    for recipe in recipes:
        kinds = {tensors[part.source].dtype for part in recipe.parts if part.source in tensors}
        if len(kinds) > 1:
            problems.append(f"  {recipe.name}: its parts mix {', '.join(sorted(kinds))}; convert with --dtype")
    return problems


def _coverage(name: str, tensor: Tensor, ranges: list[tuple[int, int]], copies: bool) -> list[str]:
    """Every element once: the sorted ranges must lie end to end from 0 to the last element."""
    lost = uncovered(tensor)
    if lost:
        return [f"  {name}: {lost} of its {tensor.numel} elements are in no file"]
    position = 0
    for start, stop in sorted(set(ranges)) if copies else sorted(ranges):
        if start > position or (start < position and not copies):
            return [f"  {name}: elements {min(start, position)} to {max(start, position)} are used twice or not at all"]
        position = max(position, stop)
    return [] if position == tensor.numel else [f"  {name}: only {position} of {tensor.numel} elements are used"]


def _columns(name: str, tensor: Tensor, cuts: set[tuple[int, int]]) -> list[str]:
    """Parts of rows must lie end to end from the first column to the last."""
    position = 0
    for start, stop in sorted(cuts):
        if start != position:
            return [f"  {name}: columns {min(start, position)} to {max(start, position)} are used twice or not at all"]
        position = stop
    return [f"  {name}: only {position} of {tensor.columns} columns are used"] if 0 < position < tensor.columns else []


def stream(recipe: Recipe, tensors: Tensors, files: Files) -> Iterator[memoryview]:
    """The target's bytes, block by block. A block is only valid until the next one."""
    for part in recipe.parts:
        source = tensors[part.source]
        if part.columns is None:
            blocks = files.blocks(source, part.start, part.count)
        else:
            blocks = files.columns(source, part.start, part.reach(source), part.columns)
        if part.edit is None and source.dtype == recipe.dtype:
            yield from blocks
        else:
            for block in blocks:
                yield _edited(block, source.dtype, recipe.dtype, part.edit)


def made(recipe: Recipe, tensors: Tensors):
    """The whole target, as a torch.Tensor."""
    import torch

    with Files() as files:
        content = bytearray().join(bytes(block) for block in stream(recipe, tensors, files))
    return torch.frombuffer(content, dtype=getattr(torch, recipe.dtype)).view(recipe.shape)


def _edited(block: memoryview, source: str, target: str, edit: Edit | None) -> memoryview:
    import torch

    tensor = torch.frombuffer(block, dtype=getattr(torch, source))
    tensor = edit(tensor) if edit else tensor
    return memoryview(tensor.to(getattr(torch, target)).contiguous().view(torch.uint8).numpy())
