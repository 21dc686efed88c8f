"""Rows in the order in which Megatron has them."""

from megatron_moellava.mapping import QKV, Concat, Flat, FusedQKV, Heads, Mapping, both, copy, weight

GROUPED = Heads(num_attention_heads=4, num_query_groups=2, kv_channels=1)


def joined(mapping, num_rows: int, *sources: list[str]) -> list[str]:
    return [
        sources[piece.source][piece.start + row]
        for piece in mapping.pieces(num_rows, GROUPED)
        for row in range(piece.rows)
    ]


def test_qkv_rows_are_interleaved_by_query_group():
    rows = joined(QKV("m", ("q", "k", "v")), 8, ["q0", "q1", "q2", "q3"], ["k0", "k1"], ["v0", "v1"])
    assert rows == ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]


def test_fused_qkv_gives_the_same_order():
    rows = joined(FusedQKV("m", ("qkv",)), 8, ["q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1"])
    assert rows == ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]


def test_gate_stands_above_up():
    assert joined(Concat("m", ("gate", "up")), 4, ["g0", "g1"], ["u0", "u1"]) == ["g0", "g1", "u0", "u1"]


def test_shapes_outside_are_those_of_the_rows():
    """[q; k; v] of 4 heads in 2 groups of 2 channels is 8 + 4 + 4 rows; a gated fc1 is two halves."""
    heads = Heads(num_attention_heads=4, num_query_groups=2, kv_channels=2)
    qkv = QKV("attention.linear_qkv.weight", ("q.weight", "k.weight", "v.weight"))
    assert qkv.hf_shapes((16, 5), heads) == ((8, 5), (4, 5), (4, 5))
    assert FusedQKV("linear_qkv.bias", ("c_attn.bias",)).hf_shapes((16,), heads) == ((16,),)
    assert Concat("linear_fc1.weight", ("gate", "up")).hf_shapes((6, 5), heads) == ((3, 5), (3, 5))
    assert Flat("class_token", ("class_embedding",)).hf_shapes((1, 1, 7), heads) == ((7,),)
    assert Mapping("a", ("b",)).hf_shapes((3, 4), heads) == ((3, 4),)


def test_weight_and_bias_of_a_module_are_two_lines():
    weights, biases = both(QKV, "attn.qkv", "q", "k", "v")
    assert (weights.megatron, weights.hf) == ("attn.qkv.weight", ("q.weight", "k.weight", "v.weight"))
    assert (biases.megatron, biases.hf) == ("attn.qkv.bias", ("q.bias", "k.bias", "v.bias"))
    assert weight(Concat, "fc1", "gate", "up") == (Concat("fc1.weight", ("gate.weight", "up.weight")),)
    assert copy("a", "b") == Mapping("a", ("b",))
