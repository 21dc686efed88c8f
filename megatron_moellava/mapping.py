"""Mapping objects: one line per Megatron tensor says which Hugging Face tensors hold its rows, for both directions.

Unusual: a mapping never touches numbers. Every layout difference between Hugging Face and Megatron-Core for these
models is an order of *rows* (the first axis): gate above up, or q, k and v interleaved by query group. So a mapping is
a list of row ranges (`Piece`), and a conversion is a copy of byte ranges: the dtype is kept, import -> export is
byte-equal by construction, and a tensor that is larger than memory streams through in pieces.

Names are patterns: `{i}` is the layer. They are relative to their module: `language_model.` or `vision_tower.` is put
in front by the caller. Experts do not appear here: `conversion.layout` lifts the MLP lines to experts.
"""

from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """What a fused QKV tensor needs to know of its attention (Megatron-Core's terms)."""

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int

    @property
    def query_rows_per_group(self) -> int:
        """Rows of all queries of one query group."""
        return self.num_attention_heads // self.num_query_groups * self.kv_channels


@dataclass(frozen=True, slots=True)
class Piece:
    """`rows` rows of Hugging Face tensor number `source`, from row `start` on."""

    source: int
    start: int
    rows: int


@dataclass(frozen=True, slots=True)
class Mapping:
    """One Megatron tensor equals the rows of one Hugging Face tensor, unchanged."""

    megatron: str
    hf: tuple[str, ...]

    def pieces(self, num_rows: int, heads: Heads) -> tuple[Piece, ...]:
        """Row ranges of the Hugging Face tensors, in the order of the Megatron tensor's `num_rows` rows."""
        return (Piece(0, 0, num_rows),)

    def hf_shapes(self, shape: Shape, heads: Heads) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face tensors when the Megatron tensor has `shape`."""
        rows = [0] * len(self.hf)
        for piece in self.pieces(shape[0], heads):
            rows[piece.source] += piece.rows
        return tuple((num_rows, *shape[1:]) for num_rows in rows)


@dataclass(frozen=True, slots=True)
class Flat(Mapping):
    """Same bytes, one axis on the Hugging Face side: CLIP's class token is [1, 1, H] here and [H] there."""

    def hf_shapes(self, shape: Shape, heads: Heads) -> tuple[Shape, ...]:
        return ((shape[-1],),)


@dataclass(frozen=True, slots=True)
class Concat(Mapping):
    """Equal parts below each other: `linear_fc1` of a gated MLP is [gate; up]."""

    def pieces(self, num_rows: int, heads: Heads) -> tuple[Piece, ...]:
        part = num_rows // len(self.hf)
        return tuple(Piece(source, 0, part) for source in range(len(self.hf)))


@dataclass(frozen=True, slots=True)
class QKV(Mapping):
    """Separate q, k, v -> Megatron's order: for each query group its queries, its key, its value.

    4 heads in 2 groups: rows of [q0 q1 k0 v0 q2 q3 k1 v1], each `kv_channels` high. The order is what lets tensor
    parallelism cut the fused tensor anywhere between two groups.
    """

    def pieces(self, num_rows: int, heads: Heads) -> tuple[Piece, ...]:
        query, head = heads.query_rows_per_group, heads.kv_channels
        return tuple(
            piece
            for group in range(heads.num_query_groups)
            for piece in (
                Piece(0, group * query, query),
                Piece(1, group * head, head),
                Piece(2, group * head, head),
            )
        )


@dataclass(frozen=True, slots=True)
class FusedQKV(Mapping):
    """One Hugging Face tensor [all q; all k; all v] (Qwen v1's `c_attn`) -> Megatron's interleaved order."""

    def pieces(self, num_rows: int, heads: Heads) -> tuple[Piece, ...]:
        query, head = heads.query_rows_per_group, heads.kv_channels
        key_start = query * heads.num_query_groups
        value_start = key_start + head * heads.num_query_groups
        return tuple(
            piece
            for group in range(heads.num_query_groups)
            for piece in (
                Piece(0, group * query, query),
                Piece(0, key_start + group * head, head),
                Piece(0, value_start + group * head, head),
            )
        )


def copy(megatron: str, hf: str) -> Mapping:
    """One tensor under two names, rows unchanged."""
    return Mapping(megatron, (hf,))


def both(make: type[Mapping], megatron: str, *hf: str) -> tuple[Mapping, Mapping]:
    """The weight and the bias of one module: `both(QKV, "attn.qkv", "q", "k", "v")` gives two mappings."""
    weights, biases = (
        make(f"{megatron}.{part}", tuple(f"{name}.{part}" for name in hf)) for part in ("weight", "bias")
    )
    return weights, biases


def weight(make: type[Mapping], megatron: str, *hf: str) -> tuple[Mapping]:
    """The weight of a module without bias; a tuple of one, to be used like `both`."""
    return (make(f"{megatron}.weight", tuple(f"{name}.weight" for name in hf)),)
