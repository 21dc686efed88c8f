"""A tower's layer that attends across the frames of a video before it attends within each of them (LanguageBind).

Shapes: R rows of a frame (patches and class token), N frames of all videos, V videos, T frames of each, H width.
"""

import torch

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules


class TemporalLayer(TransformerLayer):
    """x = x + embedding of its frame; x = x + attention across frames(norm(x)); then a layer as any other."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *,
        num_frames: int,
        temporal_norm,
        temporal_attention: ModuleSpec,
        **arguments,
    ):
        super().__init__(config=config, submodules=submodules, **arguments)
        self.num_frames = num_frames
        embedding_1TH = torch.randn(1, num_frames, config.hidden_size, dtype=config.params_dtype)
        self.temporal_embedding = torch.nn.Parameter(embedding_1TH * config.init_method_std)
        self.temporal_layernorm = temporal_norm(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        self.temporal_attention = build_module(
            temporal_attention, config=config, layer_number=self.layer_number, pg_collection=self.pg_collection
        )

    def forward(self, hidden_states: torch.Tensor, *positional, **arguments):
        """See TransformerLayer. `hidden_states` [R, N, H], the frames of a video behind each other."""
        return super().forward(self._across_frames(hidden_states), *positional, **arguments)

    def _across_frames(self, hidden_RNH: torch.Tensor) -> torch.Tensor:
        videos = hidden_RNH.shape[1] // self.num_frames
        hidden_RVTH = hidden_RNH.unflatten(1, (videos, self.num_frames)) + self.temporal_embedding
        rows_TSH = self.temporal_layernorm(hidden_RVTH).permute(2, 0, 1, 3).flatten(1, 2)  # S: each row of each video
        attended_TSH, bias_H = self.temporal_attention(rows_TSH, attention_mask=None)
        attended_RVTH = attended_TSH.unflatten(1, hidden_RVTH.shape[:2]).permute(1, 2, 0, 3)
        add = get_bias_dropout_add(self.training, self.config.bias_dropout_fusion)
        return add((attended_RVTH, bias_H), hidden_RVTH, self.hidden_dropout).flatten(1, 2)
