"""How far experts have moved: from the FFN they were copied from, and from each other. Read from checkpoints, no model.

Shapes: L MoE layers, E experts.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_moellava.config import CheckpointError
from megatron_moellava.conversion.layout import MLP
from megatron_moellava.conversion.megatron_checkpoint import Checkpoint, open_checkpoint
from megatron_moellava.conversion.tensors import Files, Tensor
from megatron_moellava.costs.shapes import EXPERTS, LANGUAGE

CHUNK = 1 << 22  # elements of each expert read at a time


@dataclass(frozen=True, slots=True)
class Similarity:
    """Distances are relative to the norm of the FFN of origin (without one: of the experts' mean)."""

    layers: tuple[int, ...]
    origin: str  # what the distances are from
    from_origin_LE: np.ndarray  # |W_e - W_0| / |W_0|
    between_LEE: np.ndarray  # |W_e - W_f| / |W_0|
    cosine_LEE: np.ndarray | None  # of the moves W_e - W_0; None without an origin

    @property
    def identical(self) -> bool:
        """No expert has left its siblings: a checkpoint that was only upcycled."""
        return not self.between_LEE.any()


def expert_similarity(
    checkpoint: Path, origin: Path | None = None, *, verify: bool = True, verified: bool = False
) -> Similarity:
    """`origin`: the dense stage-2 checkpoint, or the upcycled one. Raises CheckpointError when it is of another model.

    `verify`: False does not compare files with their digests. `verified`: `checkpoint` has been, in this process.
    """
    trained = open_checkpoint(checkpoint, verify=verify, verified=verified)
    source = open_checkpoint(origin, verify=verify) if origin else None
    layers = trained.model.moe_layers
    results = [_layer(layer, trained, source) for layer in layers]
    from_origin, between, cosine = (np.stack(part) for part in zip(*results, strict=True))
    name = f"{source.folder.parent.name}/{source.folder.name}" if source else "the mean of the experts"
    return Similarity(layers, name, from_origin, between, cosine if source else None)


def _layer(layer: int, trained: Checkpoint, source: Checkpoint | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    prefix = f"{LANGUAGE}decoder.layers.{layer}{MLP}"
    names = [name for name in trained.tensors if name.startswith(prefix + EXPERTS)]
    experts = trained.tensors[names[0]].shape[0]
    gram_EE, norm = np.zeros((experts, experts)), 0.0  # inner products of the moves, and |W_0|^2
    for name in names:
        before = _origin(name, prefix, experts, trained.tensors[name], source)
        part, size = _inner_products(trained.tensors[name], before)
        gram_EE, norm = gram_EE + part, norm + size
    lengths_E = np.sqrt(gram_EE.diagonal().clip(min=0))
    between = np.sqrt((gram_EE.diagonal()[:, None] + gram_EE.diagonal() - 2 * gram_EE).clip(min=0))
    np.fill_diagonal(between, 0.0)
    cosine = gram_EE / np.maximum(np.outer(lengths_E, lengths_E), 1e-30)
    return lengths_E / np.sqrt(norm), between / np.sqrt(norm), cosine


def _origin(name: str, prefix: str, experts: int, trained: Tensor, source: Checkpoint | None) -> Tensor | None:
    if source is None:
        return None
    dense = prefix + name.removeprefix(prefix + EXPERTS)
    found = source.tensors.get(name) or source.tensors.get(dense)
    if found is None or found.numel not in (trained.numel, trained.numel // experts):
        raise CheckpointError(
            f"--origin {source.folder} has no {dense} of a fitting shape; give the stage-2 checkpoint that was upcycled, "
            "or the upcycled one"
        )
    return found


def _inner_products(trained: Tensor, before: Tensor | None) -> tuple[np.ndarray, float]:
    """(inner products of W_e - W_0 [E, E], |W_0|^2), with the mean of the experts where there is no origin."""
    experts = trained.shape[0]
    size, columns = trained.numel // experts, trained.columns
    own = before is not None and before.numel == trained.numel  # each expert has an origin of its own
    gram_EE, norm = np.zeros((experts, experts)), 0.0
    step = max(CHUNK // columns, 1) * columns
    with Files() as files:
        for start in range(0, size, step):
            count = min(step, size - start)
            now = np.stack([_read(files, trained, expert * size + start, count) for expert in range(experts)])
            if before is None:
                then = now.mean(axis=0, keepdims=True)
            else:
                slices = range(experts) if own else range(1)
                then = np.stack([_read(files, before, number * size + start, count) for number in slices])
            moves = now - then
            gram_EE += moves @ moves.T
            norm += float((then**2).sum() / len(then))
    return gram_EE, norm


def _read(files: Files, tensor: Tensor, start: int, count: int) -> np.ndarray:
    """float64 values of a stretch of a tensor."""
    import torch

    data = b"".join(bytes(block) for block in files.blocks(tensor, start, count))
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, tensor.dtype)).double().numpy()
