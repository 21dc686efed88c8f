"""Core attention over torch's scaled_dot_product_attention, for machines without Transformer Engine.

Megatron-core's own DotProductAttention refuses packed rows and context parallelism; this one takes them, grouped queries,
padded batches and KV caches, with the same interface. Under context parallelism it serves GPUs as well. Shapes: S
sequence, L positions of this rank, B batch, T packed tokens, N samples in a row, H heads, M = N x H, G query groups, D
channels of a head.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.nn.functional as F

from megatron_moellava import platform
from megatron_moellava.model.context_parallel import attention_pieces, chunks_of_rank, gather_positions

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

# Megatron-core takes the "thd" branch (a Python loop over samples for rotary embeddings) only for that very name. Without
# Transformer Engine the rows keep their [S, B, H, D] shape, and the segments reach this module alone.
SEGMENTED = "segmented_sbhd"
SHORT = 256  # tokens of a packed row's longest sample up to which attention is spelt out
ROUNDED_UP_TO = 8  # tokens: oneDNN compiles a product for every length that it meets, and of such lengths there are few


@dataclass
class PackedRow(PackedSeqParams):
    """A packed row for our own attention, which cuts it on the host: `lengths` of its samples."""

    lengths: list[int] = field(default_factory=list)


class SdpaCoreAttention(MegatronModule):
    """softmax(q k / sqrt(D)) v, causal or full, per packed sample where `packed_seq_params` names them."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        self.attn_mask_type = attn_mask_type
        self.cp_group = pg_collection.cp if pg_collection and config.context_parallel_size > 1 else None
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query_SBHD: torch.Tensor,
        key_SBGD: torch.Tensor,
        value_SBGD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
    ) -> torch.Tensor:
        """Returns [S, B, H * D], D of the values. `attention_mask` [B or 1, 1, Sq, Sk]: True = may not attend; None: by the
        mask type."""
        assert attention_bias is None, "attention bias is not supported"
        if self.cp_group is not None:
            assert attention_mask is None, "context parallelism knows causal rows, packed or not"
            return self._share_of_row(query_SBHD, key_SBGD, value_SBGD, packed_seq_params)
        if packed_seq_params is not None and self.attn_mask_type == AttnMaskType.no_mask:
            return self._packed_whole(query_SBHD, key_SBGD, value_SBGD, packed_seq_params)
        if packed_seq_params is not None:
            return self._packed(query_SBHD, key_SBGD, value_SBGD, packed_seq_params)
        query, key, value = (item.permute(1, 2, 0, 3) for item in (query_SBHD, key_SBGD, value_SBGD))
        is_causal = attention_mask is None and (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        context = self._attend(query, key, value, None if attention_mask is None else ~attention_mask, is_causal)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, query_BHSD, key_BGSD, value_BGSD, may_attend, is_causal: bool) -> torch.Tensor:
        if may_attend is not None and platform.HAS_CUDA:  # with grouped queries torch would spell [B, H, S, S] out
            groups = query_BHSD.shape[1] // key_BGSD.shape[1]
            key_BGSD, value_BGSD = (item.repeat_interleave(groups, dim=1) for item in (key_BGSD, value_BGSD))
        channels, width = value_BGSD.shape[-1], query_BHSD.shape[-1]
        if channels < width:  # torch's fused kernels want one width; without them it would spell the scores out
            value_BGSD = F.pad(value_BGSD, (0, width - channels))
        context_BHSD = F.scaled_dot_product_attention(
            query_BHSD,
            key_BGSD,
            value_BGSD,
            attn_mask=may_attend,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.softmax_scale,
            enable_gqa=query_BHSD.shape[1] != key_BGSD.shape[1],
        )
        return context_BHSD if channels == width else context_BHSD[..., :channels]

    def _attend_short(self, query_NHSD, key_NGSD, value_NGSD) -> torch.Tensor:
        """Causal attention spelt out: for many short samples several times as fast as torch's fused kernel on a CPU."""
        groups = query_NHSD.shape[1] // key_NGSD.shape[1]
        key_NHSD, value_NHSD = key_NGSD.repeat_interleave(groups, 1), value_NGSD.repeat_interleave(groups, 1)
        length = query_NHSD.shape[2]
        future_SS = query_NHSD.new_full((length, length), float("-inf")).triu_(1)
        query_MSD, key_MSD, value_MSD = (item.flatten(0, 1) for item in (query_NHSD, key_NHSD, value_NHSD))
        scores_MSS = torch.baddbmm(future_SS, query_MSD, key_MSD.transpose(1, 2), alpha=self.softmax_scale)
        context_MSD = F.dropout(scores_MSS.softmax(dim=-1), self.dropout, self.training) @ value_MSD
        return context_MSD.unflatten(0, query_NHSD.shape[:2])

    def _packed(self, query_TBHD, key_TBGD, value_TBGD, packed: PackedRow) -> torch.Tensor:
        """Block-diagonal causal attention. Rows of short samples are one batch; of others, each sample is its own."""
        if packed.max_seqlen_q <= SHORT:
            return self._packed_batch(query_TBHD, key_TBGD, value_TBGD, packed)
        samples = (item.permute(1, 2, 0, 3).split(packed.lengths, dim=2) for item in (query_TBHD, key_TBGD, value_TBGD))
        context_BHTD = torch.cat([self._attend_sample(*sample) for sample in zip(*samples, strict=True)], dim=2)
        return context_BHTD.permute(2, 0, 1, 3).flatten(2)

    def _packed_whole(self, query_TBHD, key_TBGD, value_TBGD, packed: PackedRow) -> torch.Tensor:
        """Block-diagonal attention without a mask, as a tower's images have it: images of one size are a batch."""
        offsets = [0, *accumulate(packed.lengths)]
        by_length: dict[int, list[int]] = defaultdict(list)
        for number, length in enumerate(packed.lengths):
            by_length[length].append(number)
        parts: list[torch.Tensor] = [query_TBHD] * len(packed.lengths)
        for length, numbers in by_length.items():
            own = [
                [item[offsets[i] : offsets[i] + length, 0] for i in numbers]
                for item in (query_TBHD, key_TBGD, value_TBGD)
            ]
            query, key, value = (torch.stack(items).transpose(1, 2) for items in own)
            context_NSHD = self._attend(query, key, value, None, is_causal=False).transpose(1, 2)
            for number, context_SHD in zip(numbers, context_NSHD, strict=True):
                parts[number] = context_SHD
        return torch.cat(parts).flatten(1).unsqueeze(1)

    def _attend_sample(self, query_BHSD, key_BGSD, value_BGSD) -> torch.Tensor:
        if query_BHSD.shape[2] <= SHORT:
            return self._attend_short(query_BHSD, key_BGSD, value_BGSD)
        return self._attend(query_BHSD, key_BGSD, value_BGSD, None, is_causal=True)

    def _packed_batch(self, query_TBHD, key_TBGD, value_TBGD, packed: PackedRow) -> torch.Tensor:
        """The samples of the row as a batch, right-padded to the longest, and to a length that comes again.

        Causal attention never looks to the right, so the padding needs no mask. Samples of 3 and 2 tokens:
        rows [0 1 2] and [3 4 4] of the packed row, of which position (1, 2) is thrown away.
        """
        length = -(-packed.max_seqlen_q // ROUNDED_UP_TO) * ROUNDED_UP_TO
        rows_NS, places_T = segment_rows(packed.cu_seqlens_q, length, query_TBHD.shape[0])
        query, key, value = (
            _Spread.apply(item.squeeze(1), rows_NS, places_T).transpose(1, 2)
            for item in (query_TBHD, key_TBGD, value_TBGD)
        )
        context_NSHD = self._attend_short(query, key, value).transpose(1, 2)
        return _Gathered.apply(context_NSHD.flatten(0, 1), places_T).flatten(1).unsqueeze(1)

    def _share_of_row(self, query_LBHD, key_LBGD, value_LBGD, packed: PackedRow | None) -> torch.Tensor:
        """Causal attention of this rank's positions to the whole row, sample by sample (`context_parallel.py`)."""
        both_SBGD = gather_positions(torch.cat([key_LBGD, value_LBGD], -1))
        key_SBGD, value_SBGD = both_SBGD.split([key_LBGD.shape[-1], value_LBGD.shape[-1]], -1)
        length = key_SBGD.shape[0]
        assert self.cp_group is not None
        boundaries = [0, length] if packed is None else packed.cu_seqlens_q.tolist()
        parts = []
        for piece in attention_pieces(chunks_of_rank(length, self.cp_group.size(), self.cp_group.rank()), boundaries):
            query, key, value = query_LBHD[piece.queries], key_SBGD[piece.keys], value_SBGD[piece.keys]
            query, key, value = (item.permute(1, 2, 0, 3) for item in (query, key, value))
            is_whole = query.shape[2] == key.shape[2]
            mask = None if is_whole else causal_mask(query.shape[2], key.shape[2], query.device)
            parts.append(self._attend(query, key, value, mask, is_causal=is_whole).permute(2, 0, 1, 3))
        return torch.cat(parts).flatten(2)


class _Spread(torch.autograd.Function):
    """Packed row [T, ...] -> samples [N, S, ...]; its backward only copies, where an index would add up.

    Right for causal attention alone: what pads a sample is seen by no token, so its gradient is zero.
    """

    @staticmethod
    def forward(ctx, row_T, rows_NS, places_T):
        ctx.save_for_backward(places_T)
        return row_T.index_select(0, rows_NS.flatten()).unflatten(0, rows_NS.shape)

    @staticmethod
    def backward(ctx, grad_NS):
        (places_T,) = ctx.saved_tensors
        return grad_NS.flatten(0, 1).index_select(0, places_T), None, None


class _Gathered(torch.autograd.Function):
    """Padded samples [N * S, ...] -> the packed row [T, ...]; every place is read at most once."""

    @staticmethod
    def forward(ctx, padded_P, places_T):
        ctx.save_for_backward(places_T)
        ctx.padded = padded_P.shape[0]
        return padded_P.index_select(0, places_T)

    @staticmethod
    def backward(ctx, grad_T):
        (places_T,) = ctx.saved_tensors
        padded_P = grad_T.new_zeros(ctx.padded, *grad_T.shape[1:])
        return padded_P.index_copy_(0, places_T, grad_T), None


def causal_mask(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """[queries, keys], True = may attend: the last query sees every key, the one before it all but the last."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def segment_rows(cu_seqlens: torch.Tensor, max_seqlen: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Index [N, max_seqlen] of each sample's tokens in the packed row, and where each token lies in that, flattened [T].

    cu_seqlens [0, 3, 5] -> [[0, 1, 2], [3, 4, 4]] and [0, 1, 2, 3, 4]. `cu_seqlens` must end at num_tokens. No boolean index:
    on a GPU the host would wait to learn how many are true.
    """
    starts_N = cu_seqlens[:-1].long()
    rows_NS = starts_N[:, None] + torch.arange(max_seqlen, device=cu_seqlens.device)
    tokens_T = torch.arange(num_tokens, device=cu_seqlens.device)
    sample_T = torch.searchsorted(cu_seqlens[1:].long(), tokens_T, right=True)
    return rows_NS.clamp(max=num_tokens - 1), sample_T * max_seqlen + tokens_T - starts_N[sample_T]


def packed_seq_params(
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    is_shared: bool = False,
    lengths: list[int] | None = None,
) -> PackedSeqParams | None:
    """Megatron-Core's description of a packed row; the last entry of `cu_seqlens` is the length of the row.

    `cu_seqlens` comes on the host; on the device it is right, too, and read from there once. `is_shared`: the row is spread
    over context-parallel ranks; only our own attention reads it, on the host. `lengths`: of the samples, where they are known.
    """
    if cu_seqlens is None:
        return None
    there = cu_seqlens.cpu() if is_shared else platform.on_device(cu_seqlens)
    fields = {"cu_seqlens_q": there, "cu_seqlens_kv": there, "max_seqlen_q": max_seqlen, "max_seqlen_kv": max_seqlen}
    if platform.HAS_TRANSFORMER_ENGINE and not is_shared:
        return PackedSeqParams(qkv_format="thd", **fields)
    return PackedRow(qkv_format=SEGMENTED, lengths=lengths or cu_seqlens.diff().tolist(), **fields)
