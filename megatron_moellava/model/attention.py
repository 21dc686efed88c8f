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
from typing import Any

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
SHORT = 256  # tokens of a sample up to which attention is spelt out
SHORT_BF16 = 512  # on a CPU, whose matrix units torch's fused kernel leaves idle in its backward pass
SPARED = 128**2  # scores of a head: samples that would be padded by more get a batch of their own
ROUNDED_UP_TO = 8  # tokens: oneDNN compiles a product for every length that it meets, and of such lengths there are few


@dataclass(frozen=True, slots=True)
class SampleBatches:
    """A packed row cut into batches of samples that are nearly as long as each other.

    `shapes`: (samples, tokens) of each. `rows_P`: for every position of the batches, one batch after the other, its token in
    the row. `places_T`: the other way round.
    """

    shapes: list[tuple[int, int]]
    rows_P: torch.Tensor
    places_T: torch.Tensor

    def cut(self, row_TBHD: torch.Tensor) -> list[torch.Tensor]:
        """[T, 1, H, D] -> [N, H, S, D] for each batch."""
        positions_PHD = _Spread.apply(row_TBHD.squeeze(1), self.rows_P, self.places_T)
        parts = positions_PHD.split([samples * tokens for samples, tokens in self.shapes])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)]

    def joined(self, batches_NHSD: list[torch.Tensor]) -> torch.Tensor:
        """[N, H, S, D] for each batch -> [T, 1, H * D]."""
        positions_PHD = torch.cat([batch.transpose(1, 2).flatten(0, 1) for batch in batches_NHSD])
        return _Gathered.apply(positions_PHD, self.places_T).flatten(1).unsqueeze(1)


@dataclass
class PackedRow(PackedSeqParams):
    """A packed row for our own attention, which cuts it on the host: `lengths` of its samples."""

    lengths: list[int] = field(default_factory=list)
    cuts: dict[int, SampleBatches] = field(default_factory=dict)

    def batches(self, short: int) -> SampleBatches:
        """Samples of more than `short` tokens are alone; every layer takes the same."""
        if short not in self.cuts:
            self.cuts[short] = sample_batches(self.lengths, short)
        return self.cuts[short]


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
        groups, length = query_NHSD.shape[1] // key_NGSD.shape[1], query_NHSD.shape[2]
        key_NHSD, value_NHSD = (
            item if groups == 1 else item.repeat_interleave(groups, 1) for item in (key_NGSD, value_NGSD)
        )
        future_SS = query_NHSD.new_full((length, length), float("-inf")).triu_(1)
        query_MSD, key_MSD, value_MSD = (item.flatten(0, 1) for item in (query_NHSD, key_NHSD, value_NHSD))
        scores_MSS = torch.baddbmm(future_SS, query_MSD, key_MSD.transpose(1, 2), alpha=self.softmax_scale)
        context_MSD = F.dropout(scores_MSS.softmax(dim=-1), self.dropout, self.training) @ value_MSD
        return context_MSD.unflatten(0, query_NHSD.shape[:2])

    def _packed(self, query_TBHD, key_TBGD, value_TBGD, packed: PackedRow) -> torch.Tensor:
        """Block-diagonal causal attention, one batch of samples after the other."""
        short = SHORT_BF16 if query_TBHD.dtype == torch.bfloat16 and not platform.HAS_CUDA else SHORT
        batches = packed.batches(short)
        parts = zip(*(batches.cut(item) for item in (query_TBHD, key_TBGD, value_TBGD)), strict=True)
        return batches.joined([self._attend_batch(query, key, value, short) for query, key, value in parts])

    def _attend_batch(self, query_NHSD, key_NGSD, value_NGSD, short: int) -> torch.Tensor:
        if query_NHSD.shape[2] <= short:
            return self._attend_short(query_NHSD, key_NGSD, value_NGSD)
        return self._attend(query_NHSD, key_NGSD, value_NGSD, None, is_causal=True)

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
    """Packed row [T, ...] -> positions of its batches [P, ...]; its backward only copies, where an index would add up.

    Right for causal attention alone: what pads a sample is seen by no token, so its gradient is zero.
    """

    @staticmethod
    def forward(ctx, row_T, rows_P, places_T):
        ctx.save_for_backward(places_T)
        return row_T.index_select(0, rows_P)

    @staticmethod
    def backward(ctx, grad_P):
        (places_T,) = ctx.saved_tensors
        return grad_P.index_select(0, places_T), None, None


class _Gathered(torch.autograd.Function):
    """Positions of the batches [P, ...] -> the packed row [T, ...]; every place is read at most once."""

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


def sample_batches(lengths: list[int], short: int) -> SampleBatches:
    """Samples of these lengths in batches, the longest first, right-padded to the longest of each, rounded up.

    Causal attention never looks to the right, so the padding needs no mask. Samples of 3 and 2 tokens, were nothing rounded
    up: rows_P [0 1 2 3 4 4], places_T [0 1 2 3 4]; position 5 is thrown away. Samples of more than `short` tokens are batches
    of their own, without padding. Made on the host, so that a GPU is waited for nowhere.
    """
    starts = [0, *accumulate(lengths)]
    batches: list[list[int]] = []
    for number in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i]):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and longest <= short and longest**2 - lengths[number] ** 2 <= SPARED:
            batches[-1].append(number)
        else:
            batches.append([number])
    shapes, rows, places_T, first = [], [], torch.empty(starts[-1], dtype=torch.int64), 0
    for batch in batches:
        longest = lengths[batch[0]]
        tokens = longest if longest > short else -(-longest // ROUNDED_UP_TO) * ROUNDED_UP_TO
        shapes.append((len(batch), tokens))
        for number in batch:
            start, length = starts[number], lengths[number]
            rows.append(torch.arange(start, start + tokens))
            places_T[start : start + length] = torch.arange(first, first + length)
            first += tokens
    rows_P = torch.cat(rows).clamp_(max=starts[-1] - 1)
    return SampleBatches(shapes, platform.on_device(rows_P), platform.on_device(places_T))


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
    fields: dict[str, Any] = {
        "cu_seqlens_q": there,
        "cu_seqlens_kv": there,
        "max_seqlen_q": max_seqlen,
        "max_seqlen_kv": max_seqlen,
    }
    if platform.HAS_TRANSFORMER_ENGINE and not is_shared:
        return PackedSeqParams(qkv_format="thd", **fields)
    return PackedRow(qkv_format=SEGMENTED, lengths=lengths or cu_seqlens.diff().tolist(), **fields)
