"""MoE layers beyond Megatron-Core's: experts that are all on this rank, the residual MoE, those of tower and projector."""

import copy

import torch
import torch.nn.functional as F

import megatron_moellava.platform as platform
from megatron_moellava.model.experts import GroupedMLP

from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


class MoELayer(moe_layer.MoELayer):
    """Megatron-Core's; where every expert is on this rank, no token travels and the host waits for no count."""

    def __init__(self, config, submodules: MoESubmodules, **kwargs):
        super().__init__(config=config, submodules=submodules, **kwargs)
        dispatcher = self.token_dispatcher
        takes_counts_of_the_device = isinstance(self.experts, GroupedMLP)
        is_all_to_all = isinstance(dispatcher, MoEAlltoAllTokenDispatcher)
        if takes_counts_of_the_device and is_all_to_all and dispatcher.ep_size == dispatcher.tp_size == 1:
            dispatcher.__class__ = HereDispatcher  # the same state; Megatron-Core chooses the class by name


class HereDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron-Core's dispatcher without expert and expert tensor parallelism.

    Its first permutation has sorted the tokens by expert; it would sort them again, chunk by chunk, for which the host has to
    know the counts. Only where a capacity cuts rows, or padding adds some, does the host have to ask how many there are.
    """

    def dispatch_preprocess(self, hidden_SBH: torch.Tensor, map_TE: torch.Tensor, weights_TE: torch.Tensor):
        """(tokens sorted by expert, their routing weights). Megatron-Core's, but that on a CPU it sorts no mask [E, T]."""
        fills_up = self.drop_and_pad or self.config.moe_router_padding_for_quantization
        if platform.HAS_CUDA or fills_up or self.shared_experts is not None:
            return super().dispatch_preprocess(hidden_SBH, map_TE, weights_TE)
        self.hidden_shape, self.probs, self.routing_map = hidden_SBH.shape, weights_TE, map_TE
        hidden_TH = hidden_SBH.flatten(0, -2)
        self.hidden_shape_before_permute = hidden_TH.shape
        self.tokens_per_expert = self.preprocess(map_TE)
        chosen_N = map_TE.t().flatten().nonzero_static(size=int(self.num_out_tokens)).squeeze(1)
        tokens_N = chosen_N % len(hidden_TH)
        self.reversed_local_input_permutation_mapping = tokens_N
        return hidden_TH.index_select(0, tokens_N), weights_TE.t().flatten().index_select(0, chosen_N)

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: torch.Tensor | None = None):
        config = self.config
        is_known = config.moe_expert_capacity_factor is None and not config.moe_router_padding_for_quantization
        if is_known:  # top-k rows of each token
            return tokens_per_expert
        return super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)

    def dispatch_postprocess(self, hidden_NH: torch.Tensor, weights_N: torch.Tensor):
        """(tokens sorted by expert, counts [E] where they were made, routing weights)"""
        return hidden_NH, self.tokens_per_expert, weights_N

    def combine_preprocess(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """The experts' outputs, in the order of the first permutation."""
        return hidden_NH


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


class VisionMoELayer(MoELayer):
    """A MoE layer of the tower or the projector, where every tensor-parallel rank has all tokens.

    The ranks divide the tokens among themselves, as sequence parallelism would, and gather what the experts say: without
    that each would send the same tokens, and their gradients would count as often as there are ranks.
    """

    def __init__(self, config, submodules: MoESubmodules, **kwargs):
        divided = copy.copy(config)
        divided.sequence_parallel = config.tensor_model_parallel_size > 1
        super().__init__(divided, submodules, **kwargs)
        # Megatron-Core moves the expert biases of all routers of a model together, and resets all their counts, where the
        # language model's have some; these have none.
        self.router.frozen_expert_bias = True
        self.router.local_tokens_per_expert = torch.zeros(config.num_moe_experts)

    def forward(self, hidden_SBH: torch.Tensor, intermediate_tensors=None, padding_mask: torch.Tensor | None = None):
        """[S, B, H] -> [S, B, O], and None for the bias. `padding_mask` [B, S]: True where a token is none."""
        size, count = self.tp_group.size(), hidden_SBH.shape[0] * hidden_SBH.shape[1]
        if size == 1:
            return super().forward(hidden_SBH, intermediate_tensors, padding_mask)
        missing = -count % size
        if missing and padding_mask is None:
            padding_mask = hidden_SBH.new_zeros(hidden_SBH.shape[1::-1], dtype=torch.bool)
        hidden_N1H = F.pad(hidden_SBH.flatten(0, 1).unsqueeze(1), (0, 0, 0, 0, 0, missing))
        share_N1H = scatter_to_sequence_parallel_region(hidden_N1H, group=self.tp_group)
        if padding_mask is not None:
            padding_N = F.pad(padding_mask.transpose(0, 1).flatten(), (0, missing), value=True)
            padding_mask = padding_N.chunk(size)[self.tp_group.rank()].unsqueeze(0)
        output_N1O, _ = super().forward(share_N1H, intermediate_tensors, padding_mask)
        # What follows is the same on all ranks, and so is its gradient: each takes its share of it.
        whole_N1O = gather_from_sequence_parallel_region(
            output_N1O, tensor_parallel_output_grad=False, group=self.tp_group
        )
        return whole_N1O[:count].view(*hidden_SBH.shape[:2], -1), None
