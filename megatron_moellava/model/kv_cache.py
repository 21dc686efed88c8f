"""Keys and values of running requests, and the attention that reads them.

One forward pass may hold whole prompts and single next tokens of many requests side by side: all of them lie in one
packed row [T, 1, H], without padding. `Step` says which request (cache row) and which position each token belongs to.
Keys are stored rotated, so that a step rotates only its new tokens. Plain torch operations on every device.

Multi-latent attention (`latent_attention.py`) stores keys alone, whose first channels are the values.

Shapes: T tokens of a step, R cache rows, N requests that get one token, P tokens of a prompt, S positions, H heads,
G query groups, D channels of a head, C rotated channels.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from megatron_moellava.model.attention import causal_mask

from megatron.core.transformer.attention import SelfAttention


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Past:
    """What is known of a prompt's beginning: the keys (rotated) and values of its first `length` positions."""

    length: int
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]]  # [G, S, D] each, of at least so many positions


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The tokens of one forward pass: first the prompts, one after the other, then one token for each of rows 0 .. N-1.

    Rows 1 and 2 get prompts of 3 and 2 tokens while row 0 continues at position 7: prompts ((1, 3), (2, 2)),
    decoding 1, positions [0 1 2 0 1 7]. Of a prompt with a past only the other tokens are in the step.
    """

    prompts: tuple[tuple[int, int], ...]  # (cache row, tokens)
    decoding: int  # N
    positions_T: torch.Tensor
    pasts: tuple[Past | None, ...] = ()  # of each prompt; empty: none has one

    def last_tokens(self) -> list[int]:
        """Indices of the tokens whose logits are wanted: the end of each prompt, and every single token."""
        ends, end = [], 0
        for _, length in self.prompts:
            end += length
            ends.append(end - 1)
        return ends + list(range(end, end + self.decoding))

    def prompts_with_pasts(self) -> list[tuple[int, int, Past | None]]:
        """(cache row, tokens, what came before them) of each prompt."""
        pasts = self.pasts or (None,) * len(self.prompts)
        return [(row, length, past) for (row, length), past in zip(self.prompts, pasts, strict=True)]


GROWTH = 256  # positions by which the rows grow


@dataclass(slots=True)
class KVCache:
    """Megatron-Core hands it to every layer as `inference_context`. Rows are independent of each other.

    Memory is taken as requests come and grow, never for all rows and positions at once: those of Llama-3.1-8B, 32 rows of
    131,072 positions, are 512 GiB.
    """

    max_batch_size: int
    max_sequence_length: int
    step: Step | None = None
    lengths_R: list[int] = field(default_factory=list)  # tokens stored in each row; rows 0 .. N-1 decode together
    held: tuple[int, int] = (
        0,
        0,
    )  # rows and positions that the layers have memory for, or will have in their next turn
    _layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # [R, G, S, D] each
    _table: tuple[torch.Tensor, torch.Tensor] | None = None  # rotations of all positions
    _rotation: tuple[torch.Tensor, torch.Tensor] | None = None  # of this step
    _rows_N: torch.Tensor | None = None
    _longest: int = 0  # of the rows that decode
    _hidden_N11S: torch.Tensor | None = None  # True where a single token may not look; None: rows of one length

    def __post_init__(self) -> None:
        self.lengths_R = [0] * self.max_batch_size

    def is_static_batching(self) -> bool:  # asked by Megatron-Core
        return True

    def is_decode_only(self) -> bool:  # asked by Megatron-Core
        return not self.current_step.prompts

    @property
    def current_step(self) -> Step:
        """What `begin` announced."""
        assert self.step is not None, "begin() comes first"
        return self.step

    def begin(self, step: Step) -> None:
        """Announce the tokens of the next forward pass."""
        self.step, self._rotation = step, None
        for row, length, past in step.prompts_with_pasts():
            self.lengths_R[row] = length + (past.length if past else 0)
        for row in range(step.decoding):
            self.lengths_R[row] += 1
        self._hold(step)
        if step.decoding:
            lengths_N = torch.tensor(self.lengths_R[: step.decoding], device=step.positions_T.device)
            self._longest = max(self.lengths_R[: step.decoding])
            hidden_NS = torch.arange(self._longest, device=lengths_N.device) >= lengths_N[:, None]
            is_even = min(self.lengths_R[: step.decoding]) == self._longest
            self._hidden_N11S = None if is_even else hidden_NS[:, None, None, :]
            self._rows_N = torch.arange(step.decoding, device=step.positions_T.device)

    def _hold(self, step: Step) -> None:
        """Room for the rows of this step. Where nobody else has a row it begins anew: a long request is not paid for ever."""
        if step.prompts and step.prompts[0][0] == 0:
            self._layers.clear()
            self.held = (0, 0)
        rows = max([step.decoding, *(row + 1 for row, _ in step.prompts)])
        positions = max(self.lengths_R[:rows])
        if rows > self.held[0] or positions > self.held[1]:  # now both become what is needed, also where that is less
            self.held = rows, min(-(-positions // GROWTH) * GROWTH, self.max_sequence_length)

    def row(self, row: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Copies of a row's keys and values by layer, [G, S, D] each."""
        part = row, slice(None), slice(0, self.lengths_R[row])
        return {layer: (keys[part].clone(), values[part].clone()) for layer, (keys, values) in self._layers.items()}

    def copy_row(self, source: int, target: int) -> None:
        """Make a row equal to another one."""
        length = self.lengths_R[target] = self.lengths_R[source]
        self.held = max(self.held[0], target + 1), self.held[1]
        self._grow()
        for keys_RGSD, values_RGSD in self._layers.values():
            keys_RGSD[target, :, :length] = keys_RGSD[source, :, :length]
            values_RGSD[target, :, :length] = values_RGSD[source, :, :length]

    def reorder(self, rows: list[int], sources: list[int]) -> None:
        """Row rows[i] becomes what row sources[i] was, all at once (beams that change places)."""
        length = max(self.lengths_R[source] for source in sources)
        for layer in self._layers.values():
            for stored_RGSD in layer:
                stored_RGSD[rows, :, :length] = stored_RGSD[sources, :, :length]
        lengths = [self.lengths_R[source] for source in sources]
        for row, length in zip(rows, lengths, strict=True):
            self.lengths_R[row] = length

    def attend(self, layer: int, query_THD, key_TGD, value_TGD, angles_S11C) -> torch.Tensor:
        """Store the new keys and values, and let every token look at its own request's past. Returns [T, H * D]."""
        query_THD, key_TGD = self.rotate(query_THD, angles_S11C), self.rotate(key_TGD, angles_S11C)
        return self.look(layer, query_THD, key_TGD, value_TGD)

    def rotate(self, x_TAD: torch.Tensor, angles_S11C: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of this step's positions; x [T, ..., D], whatever lies between."""
        if self._rotation is None:
            if self._table is None:
                self._table = rotation(angles_S11C[:, 0, 0], x_TAD.dtype)
            cos_SC, sin_SC = self._table
            positions_T = self.current_step.positions_T
            self._rotation = cos_SC[positions_T], sin_SC[positions_T]
        between = (slice(None), *(None,) * (x_TAD.dim() - 2))
        return rotate(x_TAD, *(item_TC[between] for item_TC in self._rotation))

    def look(
        self,
        layer: int,
        query_THD,
        key_TGD,
        value_TGD,
        scale: float | None = None,
        value_channels: int = 0,
    ) -> torch.Tensor:
        """`attend`, of queries and keys that are rotated already.

        `scale`: of the scores; None: 1 / sqrt(D). `value_channels`: the values are so many first channels of the keys, and
        `value_TGD` is None.
        """
        if value_TGD is None:
            value_TGD = key_TGD[..., :0]
        keys_RGSD, values_RGSD = self._memory(layer, key_TGD, value_TGD)
        scale, step, start, parts = scale or query_THD.shape[-1] ** -0.5, self.current_step, 0, []
        for row, length, past in step.prompts_with_pasts():
            new = slice(start, start + length)
            key_GSD, value_GSD = key_TGD[new].transpose(0, 1), value_TGD[new].transpose(0, 1)
            if past is not None:
                before_keys, before_values = (stored_GSD[:, : past.length] for stored_GSD in past.layers[layer])
                key_GSD, value_GSD = torch.cat([before_keys, key_GSD], 1), torch.cat([before_values, value_GSD], 1)
            keys_RGSD[row, :, : key_GSD.shape[1]], values_RGSD[row, :, : key_GSD.shape[1]] = key_GSD, value_GSD
            parts.append(_attend_prompt(query_THD[new], key_GSD, key_GSD if value_channels else value_GSD, scale))
            start += length
        if step.decoding:
            keys_RGSD[self._rows_N, :, step.positions_T[start:]] = key_TGD[start:]
            values_RGSD[self._rows_N, :, step.positions_T[start:]] = value_TGD[start:]
            part = slice(0, step.decoding), slice(None), slice(0, self._longest)
            stored_RGSD = keys_RGSD if value_channels else values_RGSD
            parts.append(
                _attend_single(query_THD[start:], keys_RGSD[part], stored_RGSD[part], self._hidden_N11S, scale)
            )
        context_TX = torch.cat(parts) if len(parts) > 1 else parts[0]
        if value_channels:  # cut here, since torch's fused kernels want values as wide as keys
            return context_TX.unflatten(1, (query_THD.shape[1], -1))[..., :value_channels].flatten(1)
        return context_TX

    def _memory(self, layer: int, key_TGD: torch.Tensor, value_TGD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's keys and values, with room for what `held` says."""
        if layer not in self._layers:
            keys, values = (like.new_zeros(0, like.shape[1], 0, like.shape[2]) for like in (key_TGD, value_TGD))
            self._layers[layer] = keys, values
        self._grow(layer)
        return self._layers[layer]

    def _grow(self, *layers: int) -> None:
        """Layer after layer, so that no more than one is there twice."""
        for layer in layers or self._layers:
            keys_RGSD, values_RGSD = self._layers[layer]
            if keys_RGSD.shape[::2] != self.held:
                self._layers[layer] = resized(keys_RGSD, *self.held), resized(values_RGSD, *self.held)


def resized(stored_RGSD: torch.Tensor, rows: int, positions: int) -> torch.Tensor:
    """The same with other numbers of rows and positions.

    Zeros, not uninitialised memory: what the mask hides still gets multiplied by zero.
    """
    other_RGSD = stored_RGSD.new_zeros(rows, stored_RGSD.shape[1], positions, stored_RGSD.shape[3])
    kept = slice(0, min(rows, stored_RGSD.shape[0])), slice(None), slice(0, min(positions, stored_RGSD.shape[2]))
    other_RGSD[kept] = stored_RGSD[kept]
    return other_RGSD


def rotation(angles_TC: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, and sin whose first half is negative, as `rotate` takes them."""
    sine_TC = angles_TC.sin()
    half = sine_TC.shape[-1] // 2
    return angles_TC.cos().to(dtype), torch.cat([-sine_TC[:, :half], sine_TC[:, half:]], dim=-1).to(dtype)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first C channels, half-split as in GPT-NeoX; the others pass.

    Channel pairs (a, b) of the two halves become (a cos - b sin, b cos + a sin): the halves change places for the second
    terms, and the sign is in `sine`.
    """
    count = cosine.shape[-1]
    turned, rest = x[..., :count], x[..., count:]
    turned = torch.addcmul(turned * cosine, turned.roll(count // 2, dims=-1), sine)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def _attend_prompt(query_PHD, key_GSD, value_GSD, scale: float) -> torch.Tensor:
    """The queries are those of the last P of S positions."""
    count, size = len(query_PHD), key_GSD.shape[1]
    visible_PS = None  # PyTorch's own causal mask would let the first query see only the first key
    if count < size:
        visible_PS = causal_mask(count, size, query_PHD.device)
    context_HPD = F.scaled_dot_product_attention(
        query_PHD.transpose(0, 1)[None],
        key_GSD[None],
        value_GSD[None],
        attn_mask=visible_PS,
        is_causal=visible_PS is None,
        scale=scale,
        enable_gqa=query_PHD.shape[1] != key_GSD.shape[0],
    )[0]
    return context_HPD.transpose(0, 1).flatten(1)


def _attend_single(query_NHD, keys_NGSD, values_NGSD, hidden_N11S, scale: float) -> torch.Tensor:
    """Spelt out: the heads of a query group become the rows of one product, and keys are read once, uncopied."""
    query_NGQD = query_NHD.unflatten(1, (keys_NGSD.shape[1], -1)) * scale
    scores_NGQS = query_NGQD @ keys_NGSD.transpose(-1, -2)
    if hidden_N11S is not None:
        scores_NGQS = scores_NGQS.masked_fill(hidden_N11S, float("-inf"))
    probs_NGQS = scores_NGQS.float().softmax(dim=-1).to(query_NHD.dtype)
    return (probs_NGQS @ values_NGSD).flatten(1)


class CachedSelfAttention(SelfAttention):
    """Megatron-Core's self-attention; with a `KVCache` as inference context it attends through that."""

    def forward(self, hidden_states, attention_mask, inference_context=None, rotary_pos_emb=None, **arguments):
        """With a cache [T, 1, H] -> [T, 1, H], tokens of all requests behind each other; else Megatron-Core's."""
        if inference_context is None:
            return super().forward(hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **arguments)
        query_T1HD, key_T1GD, value_T1GD = self.get_query_key_value_tensors(hidden_states)
        context_TH = inference_context.attend(
            self.layer_number, query_T1HD.squeeze(1), key_T1GD.squeeze(1), value_T1GD.squeeze(1), rotary_pos_emb
        )
        return self.linear_proj(context_TH.unsqueeze(1))
