"""Multi-latent attention (MLA) over Megatron-Core's modules, in packed rows, on every layout and with a cache of latents.

Megatron-Core's own layer rotates positions 0, 1, ... of a row (a packed row's restart), and without Transformer Engine gathers
the rotated channels of the keys over tensor-parallel ranks without adding up their gradients. So queries, keys and values are
made here; its `forward` does the rest. For generation each position keeps its latent and its rotated channels, one "head" for
all: a head's own projection of the latent moves to its query, and that of its value behind the attention.

Shapes: S positions, B rows, T tokens of a step, H heads of this rank, D channels of a head's queries and keys, P and C those of
them that stay and that are rotated, V of its values, R of the latent.
"""

from collections.abc import Callable

import torch

from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention


class LatentSelfAttention(MLASelfAttention):
    """Megatron-Core's layer with the model's own rotary angles; with a `KVCache` as inference context it attends through that.

    `attention_factor`: what rotated queries and keys are multiplied by. `norm`: makes the norm of a latent. Megatron-Core
    builds the layer without norms: its own would have the model's epsilon, and one would stand before queries that have no
    latent.
    """

    def __init__(self, *arguments, attention_factor: float, norm: Callable[..., torch.nn.Module], **options):
        super().__init__(*arguments, **options)
        self.attention_factor = attention_factor
        if self.config.q_lora_rank is not None:
            self.q_layernorm = norm(config=self.config, hidden_size=self.config.q_lora_rank)
        self.kv_layernorm = norm(config=self.config, hidden_size=self.config.kv_lora_rank)
        del self.rotary_pos_emb  # the model has one for all layers

    def forward(self, hidden_states, attention_mask, inference_context=None, rotary_pos_emb=None, **arguments):
        """With a cache [T, 1, hidden] -> [T, 1, hidden], tokens of all requests behind each other; else Megatron-Core's."""
        if inference_context is not None:
            return self._with_cache(hidden_states, inference_context, rotary_pos_emb)
        # Megatron-Core hands `position_ids` to the method below, which wants the angles.
        return super().forward(hidden_states, attention_mask, position_ids=rotary_pos_emb, **arguments)

    def get_query_key_value_tensors(
        self, hidden_states, key_value_states=None, position_ids=None, packed_seq_params=None, **_
    ):
        """Queries and keys [S, B, H, D], values [S, B, H, V]; the last two results are of variants that are not built here.

        `position_ids`: the rotary angles [S, 1, 1, C]. Transformer Engine's packed rows have no axis B.
        """
        query, latent, turned = self.latents(hidden_states)
        plain, own_turned = self.queries(query)
        key, value = self._of_heads(self.linear_kv_up_proj(latent)[0]).split(
            [self.config.qk_head_dim, self.config.v_head_dim], dim=-1
        )
        turned = self._rotated(turned.unsqueeze(-2), position_ids).expand(*key.shape[:-1], -1)
        found = (
            torch.cat([plain, self._rotated(own_turned, position_ids)], dim=-1),
            torch.cat([key, turned], dim=-1),
            value.contiguous(),
        )
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            return *(item.squeeze(1) for item in found), None, None
        return *found, None, None

    def latents(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(what queries are made of, normed latent of keys and values [.., R], the keys' channels to rotate [S, B, C]).

        The first two are of this rank's positions under sequence parallelism, the last of all positions.
        """
        config, query = self.config, hidden
        if config.q_lora_rank is not None:
            query = self.q_layernorm(self._own_positions(self._whole(self.linear_q_down_proj(hidden)[0])))
        both = self._whole(self.linear_kv_down_proj(hidden)[0])
        latent, turned = both.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        # Every rank's heads look at them, so the backward pass adds up over ranks.
        turned = copy_to_tensor_model_parallel_region(turned, group=self.tp_group)
        return query, self.kv_layernorm(self._own_positions(latent)), turned

    def queries(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[S, B, H, P] and [S, B, H, C], of what `latents` gives first."""
        project = self.linear_q_proj if self.config.q_lora_rank is None else self.linear_q_up_proj
        plain, turned = self._of_heads(project(query)[0]).split(
            [self.config.qk_head_dim, self.config.qk_pos_emb_head_dim], dim=-1
        )
        return plain, turned

    def _whole(self, part: torch.Tensor) -> torch.Tensor:
        return gather_from_tensor_model_parallel_region(part, group=self.tp_group)

    def _own_positions(self, whole: torch.Tensor) -> torch.Tensor:
        if not self.config.sequence_parallel:
            return whole
        return scatter_to_sequence_parallel_region(whole, group=self.tp_group)

    def _of_heads(self, item: torch.Tensor) -> torch.Tensor:
        return item.unflatten(-1, (self.num_attention_heads_per_partition, -1))

    def _rotated(self, item: torch.Tensor, angles_S11C: torch.Tensor) -> torch.Tensor:
        return apply_rotary_pos_emb(
            item,
            angles_S11C,
            config=self.config,
            mscale=self.attention_factor,
            cp_group=self.pg_collection.cp,
            mla_rotary_interleaved=True,
        )

    def _with_cache(self, hidden_T1X: torch.Tensor, cache, angles_S11C: torch.Tensor):
        config = self.config
        query, latent_T1R, turned_T1C = self.latents(hidden_T1X)
        plain_THP, turned_THC = (item.squeeze(1) for item in self.queries(query))
        up_HPR, up_HVR = self.linear_kv_up_proj.weight.unflatten(0, (self.num_attention_heads_per_partition, -1)).split(
            [config.qk_head_dim, config.v_head_dim], dim=1
        )
        turned_THC, turned_T1C = (
            cache.rotate(halves(item), angles_S11C) * self.attention_factor for item in (turned_THC, turned_T1C)
        )
        query_THX = torch.cat([torch.einsum("thp,hpr->thr", plain_THP, up_HPR), turned_THC], dim=-1)
        key_T1X = torch.cat([latent_T1R, turned_T1C], dim=-1)
        context_TX = cache.look(
            self.layer_number, query_THX, key_T1X, None, scale=self.softmax_scale, value_channels=config.kv_lora_rank
        )
        context_THV = torch.einsum("thr,hvr->thv", self._of_heads(context_TX), up_HVR)
        return self.linear_proj(context_THV.flatten(1).unsqueeze(1))


def halves(pairs: torch.Tensor) -> torch.Tensor:
    """Channels that lie in neighbouring pairs, all first ones before all second ones, as `kv_cache.rotate` takes them."""
    return torch.cat([pairs[..., 0::2], pairs[..., 1::2]], dim=-1)
