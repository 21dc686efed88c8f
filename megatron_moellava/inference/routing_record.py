"""Which experts the tokens of one request went to, layer by layer.

Routers are watched by hooks, so nothing is computed twice. Shapes: T tokens of a step, E experts, K choices of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.inference.prompts import Prompt
from megatron_moellava.inference.text import TextStream
from megatron_moellava.model.moe_llava import MoELlava

from megatron.core.transformer.moe.moe_layer import MoELayer


class RoutingWatch:
    """The routers' choices of the last forward pass, on this pipeline stage."""

    def __init__(self, model: MoELlava):
        self.weights_TE: dict[int, torch.Tensor] = {}  # by layer, from 0
        self.routers = []
        layers = [layer for layer in model.language_model.decoder.layers if isinstance(layer.mlp, MoELayer)]
        for layer in layers:
            layer.mlp.router.register_forward_hook(self._keep(layer.layer_number - 1))
            self.routers.append(layer.mlp.router)
        self.active = False
        self.layers = [layer.layer_number - 1 for layer in layers]

    @property
    def active(self) -> bool:
        return self._active

    @active.setter
    def active(self, on: bool) -> None:
        self._active = on
        for router in self.routers:
            router.watched = on

    def _keep(self, layer: int):
        def hook(router, inputs, output):
            if self.active:
                self.weights_TE[layer] = output[0].detach().float().cpu()

        return hook


@dataclass(slots=True)
class RoutingRecord:
    """The choices of one request's tokens, in order, by layer."""

    parts: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, watch: RoutingWatch, indices: slice) -> None:
        for layer, weights_TE in watch.weights_TE.items():
            self.parts.setdefault(layer, []).append(weights_TE[indices])

    def table(self, prompt: Prompt, stream: TextStream) -> dict | None:
        """JSON-able. `tokens`: text of each token, or the number of its image; `layers`: per token its experts, best
        first, with their weights. None for a dense model."""
        if not self.parts:
            return None
        layers = [
            {"layer": layer, **_choices(torch.cat(parts), _most_choices(parts))}
            for layer, parts in sorted(self.parts.items())
        ]
        count = len(layers[0]["experts"])
        num_experts = next(iter(self.parts.values()))[0].shape[-1]
        return {"num_experts": num_experts, "tokens": _names(prompt, stream)[:count], "layers": layers}


def _most_choices(parts: Sequence[torch.Tensor]) -> int:
    return max(int((part > 0).sum(dim=-1).max()) for part in parts)


def _choices(weights_TE: torch.Tensor, count: int) -> dict:
    weights_TK, experts_TK = weights_TE.topk(max(count, 1), dim=-1)
    return {"experts": experts_TK.tolist(), "weights": [[round(w, 3) for w in row] for row in weights_TK.tolist()]}


def _names(prompt: Prompt, stream: TextStream) -> list[dict]:
    """{"text": piece} or {"image": i, "patch": j} of every token; the tiles of an image count on."""
    widths = [tiles * _features(prompt) for tiles in prompt.tiles]
    places = iter([(image, patch) for image, width in enumerate(widths) for patch in range(width)])
    names: list[dict] = []
    for token in prompt.tokens:
        if token == IMAGE_TOKEN:
            image, patch = next(places)
            names.append({"image": image, "patch": patch})
        else:
            names.append({"text": stream.tokenizer.decode([token])})
    return names + [{"text": stream.tokenizer.decode([token]), "answer": True} for token in stream.tokens]


def _features(prompt: Prompt) -> int:
    return prompt.tokens.count(IMAGE_TOKEN) // max(sum(prompt.tiles), 1)
