"""Which experts the tokens of one request went to, layer by layer.

`routing/token_weights.py` keeps what the routers say. Shapes: T tokens of a step, E experts, K choices of a token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.inference.prompts import Prompt
from megatron_moellava.inference.text import TextStream


@dataclass(slots=True)
class RoutingRecord:
    """The choices of one request's tokens, in order, by layer."""

    parts: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, weights_TE: dict[int, torch.Tensor], indices: slice) -> None:
        """`weights_TE`: of all tokens of a step, by layer; `indices`: those of this request."""
        for layer, step_TE in weights_TE.items():
            self.parts.setdefault(layer, []).append(step_TE[indices])

    def table(self, prompt: Prompt, stream: TextStream) -> dict | None:
        """JSON-able. `tokens`: text of each token, or the number of its image; `layers`: per token its experts, best
        first, with their weights. At native resolution `grids`: rows and columns of visual tokens of each image. `modalities`
        of the images, where they are not all plain ones. None for a dense model."""
        if not self.parts:
            return None
        layers = [
            {"layer": layer, **_choices(torch.cat(parts), _most_choices(parts))}
            for layer, parts in sorted(self.parts.items())
        ]
        count = len(layers[0]["experts"])
        num_experts = next(iter(self.parts.values()))[0].shape[-1]
        is_native = any(len(grid) == 2 for grid in prompt.grids)
        more: dict[str, list] = {"grids": _grids(prompt)} if is_native else {}
        more |= {"modalities": [*prompt.modalities]} if prompt.modalities else {}
        return {"num_experts": num_experts, "tokens": _names(prompt, stream)[:count], "layers": layers} | more


def _most_choices(parts: Sequence[torch.Tensor]) -> int:
    return max(int((part > 0).sum(dim=-1).max()) for part in parts)


def _choices(weights_TE: torch.Tensor, count: int) -> dict:
    weights_TK, experts_TK = weights_TE.topk(max(count, 1), dim=-1)
    return {"experts": experts_TK.tolist(), "weights": [[round(w, 3) for w in row] for row in weights_TK.tolist()]}


def _names(prompt: Prompt, stream: TextStream) -> list[dict]:
    """{"text": piece} or {"image": i, "patch": j} of every token; the tiles of an image count on."""
    places = iter([(image, patch) for image, width in enumerate(prompt.widths) for patch in range(width)])
    names: list[dict] = []
    for token in prompt.tokens:
        if token == IMAGE_TOKEN:
            image, patch = next(places)
            names.append({"image": image, "patch": patch})
        else:
            names.append({"text": stream.tokenizer.decode([token])})
    return names + [{"text": stream.tokenizer.decode([token]), "answer": True} for token in stream.tokens]


def _grids(prompt: Prompt) -> list[list[int]]:
    found = []
    for grid, features in zip(prompt.grids, prompt.features, strict=True):
        rows, columns = grid or (math.isqrt(features),) * 2  # of a modality's own tower: a square
        side = math.isqrt(rows * columns // features) if grid else 1
        found.append([rows // side, columns // side])
    return found
