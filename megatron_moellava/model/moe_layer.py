"""MoE layers beyond Megatron-Core's: the residual MoE, whose dense FFN stays beside the experts."""

import torch

from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules


class ResidualMoELayer(MoELayer):
    """softmax(W x + b)[0] * experts(x) + softmax(W x + b)[1] * ffn(x) (Residual MoE of DeepSpeed, arXiv 2201.05596)."""

    def __init__(self, config, submodules: MoESubmodules, dense: MLPSubmodules, pg_collection=None, **kwargs):
        super().__init__(config=config, submodules=submodules, pg_collection=pg_collection, **kwargs)
        self.residual_mlp = MLP(config, dense, ffn_hidden_size=config.ffn_hidden_size, tp_group=self.tp_group)
        self.coefficient = torch.nn.Linear(config.hidden_size, 2, dtype=config.params_dtype)
        for parameter in self.coefficient.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_SBH: torch.Tensor, intermediate_tensors=None, padding_mask: torch.Tensor | None = None):
        """[S, B, H] -> [S, B, H], and None for the bias."""
        expert_SBH, _ = super().forward(hidden_SBH, intermediate_tensors, padding_mask)
        dense_SBH, bias_H = self.residual_mlp(hidden_SBH)
        if bias_H is not None:
            dense_SBH = dense_SBH + bias_H
        share_SB2 = self.coefficient(hidden_SBH).softmax(dim=-1)
        return expert_SBH * share_SB2[..., :1] + dense_SBH * share_SB2[..., 1:], None
