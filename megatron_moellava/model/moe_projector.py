"""The projector as experts (CuMo, arXiv 2405.05949): each is a two-layer projector, and each visual token meets its best ones.

It is one MoE layer whose output is wider or narrower than its input. Shapes: N images, V visual tokens, D width of the
features, L width of the language model, T = N * V tokens.
"""

from dataclasses import replace
from functools import partial

import torch

from megatron_moellava.config import MoEConfig
from megatron_moellava.model.layers import vision_moe_submodules
from megatron_moellava.model.moe_layer import VisionMoELayer
from megatron_moellava.model.vision import ImageNewline
from megatron_moellava.towers import Tower

from megatron.core.transformer.transformer_config import TransformerConfig


class MoEProjector(VisionMoELayer):
    """Stands for `vision.Projector` where the run has `projector_moe`."""

    def __init__(self, config: TransformerConfig, tower: Tower, moe: MoEConfig):
        width, submodules = config.ffn_hidden_size, vision_moe_submodules(moe)
        super().__init__(config, replace(submodules, experts=_ending_at(width, submodules.experts)))
        self.output_size: int = width
        if tower.newline:
            self.image_newline = ImageNewline(self.output_size, config.params_dtype)

    def forward(self, features_NVD: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """[N, V, D] -> [N, V, L], or [V, D] -> [V, L]. `padding` [N, V] (or [V]): True where a token stands for nothing."""
        tokens_T1D = features_NVD.reshape(-1, 1, features_NVD.shape[-1])
        mask_1T = None if padding is None else padding.reshape(1, -1)
        output_T1L, _ = super().forward(tokens_T1D, padding_mask=mask_1T)
        return output_T1L.view(*features_NVD.shape[:-1], self.output_size)

    def routed_experts_compute(self, hidden_states: torch.Tensor, probs: torch.Tensor):
        """Megatron-Core's; the dispatcher then gives its tokens back at the width that the experts end at."""
        output, bias = super().routed_experts_compute(hidden_states, probs)
        dispatcher = self.token_dispatcher
        for name in ("hidden_shape", "hidden_shape_before_permute"):
            setattr(dispatcher, name, torch.Size((*getattr(dispatcher, name)[:-1], self.output_size)))
        return output, bias


def _ending_at(width: int, experts: partial) -> partial:
    """The same experts with another output width: Megatron-Core's end where they begin."""
    submodules = experts.keywords["submodules"]
    return partial(
        experts.func, submodules=replace(submodules, linear_fc2=partial(_linear, submodules.linear_fc2, width))
    )


def _linear(build, width: int, num_experts: int, input_size: int, output_size: int, **options):
    return build(num_experts, input_size, width, **options)
