"""Keys and values of running requests: rows, positions, rotations."""

import torch
import torch.nn.functional as F

from megatron_moellava.model.kv_cache import KVCache, Past, Step, rotate, rotation

HEADS, GROUPS, CHANNELS = 4, 2, 8


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def step(prompts, decoding, positions) -> Step:
    return Step(prompts=prompts, decoding=decoding, positions_T=torch.tensor(positions))


def test_logits_are_wanted_of_prompt_ends_and_single_tokens():
    assert step(((1, 3), (2, 2)), 1, [0, 1, 2, 0, 1, 7]).last_tokens() == [2, 4, 5]
    assert step((), 2, [4, 9]).last_tokens() == [0, 1]


def test_rotation_turns_channel_pairs_by_their_angles():
    """(a, b) of the two halves -> (a cos - b sin, b cos + a sin); channels beyond the angles pass."""
    angles_TC = torch.tensor([[0.3, 0.7, 0.3, 0.7]])
    x_TD = torch.tensor([[1.0, 2.0, 3.0, 4.0, 9.0]])
    turned = rotate(x_TD, *rotation(angles_TC, torch.float32))[0]
    cos, sin = angles_TC[0, :2].cos(), angles_TC[0, :2].sin()
    assert torch.allclose(turned[:2], x_TD[0, :2] * cos - x_TD[0, 2:4] * sin)
    assert torch.allclose(turned[2:4], x_TD[0, 2:4] * cos + x_TD[0, :2] * sin)
    assert turned[4] == 9.0


def whole(query_THD, key_TGD, value_TGD) -> torch.Tensor:
    """Causal attention of one sequence by torch: [T, H * D]."""
    q, k, v = (item.transpose(0, 1)[None] for item in (query_THD, key_TGD, value_TGD))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)


def test_prompts_and_single_tokens_side_by_side_see_their_own_past_only():
    """Row 0 goes on while rows 1 and 2 get their prompts, then all three go on together."""
    torch.manual_seed(0)
    cache = KVCache(max_batch_size=3, max_sequence_length=16)
    lengths = (4, 3, 2)
    sequences = [
        (draw(n + 3, HEADS, CHANNELS), draw(n + 3, GROUPS, CHANNELS), draw(n + 3, GROUPS, CHANNELS)) for n in lengths
    ]
    expected = [whole(*sequence) for sequence in sequences]

    def parts(places):
        """Tokens of a step: [(row, first, last), ...]."""
        return (torch.cat([sequences[row][item][a:b] for row, a, b in places]) for item in range(3))

    cache.begin(step(((0, 4),), 0, range(4)))
    assert torch.allclose(cache.look(1, *parts([(0, 0, 4)])), expected[0][:4], atol=1e-5)
    cache.begin(step(((1, 3), (2, 2)), 1, [0, 1, 2, 0, 1, 4]))
    assert not cache.is_decode_only()
    seen = cache.look(1, *parts([(1, 0, 3), (2, 0, 2), (0, 4, 5)]))
    assert torch.allclose(seen, torch.cat([expected[1][:3], expected[2][:2], expected[0][4:5]]), atol=1e-5)
    cache.begin(step((), 3, [5, 3, 2]))
    assert cache.is_decode_only() and cache.lengths_R == [6, 4, 3]
    seen = cache.look(1, *parts([(0, 5, 6), (1, 3, 4), (2, 2, 3)]))
    assert torch.allclose(seen, torch.stack([expected[0][5], expected[1][3], expected[2][2]]), atol=1e-5)


def test_values_that_are_the_first_channels_of_keys_are_stored_once():
    """Multi-latent attention: a prompt, single tokens, a past and another scale."""
    torch.manual_seed(0)
    query, key, channels = draw(7, HEADS, CHANNELS), draw(7, 1, CHANNELS), 5
    q, k, v = (item.transpose(0, 1)[None] for item in (query, key, key[..., :channels]))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3)[0]
    expected = expected.transpose(0, 1).flatten(1)
    cache = KVCache(max_batch_size=2, max_sequence_length=16)
    options = {"scale": 0.3, "value_channels": channels}
    cache.begin(step(((0, 5),), 0, range(5)))
    assert torch.allclose(cache.look(1, query[:5], key[:5], None, **options), expected[:5], atol=1e-5)
    past = Past(length=3, layers=cache.row(0))
    cache.begin(Step(prompts=((1, 2),), pasts=(past,), decoding=1, positions_T=torch.tensor([3, 4, 5])))
    seen = cache.look(1, query[3:6], key[3:6], None, **options)
    assert torch.allclose(seen, expected[3:6], atol=1e-5)
    cache.copy_row(0, 1)
    cache.begin(step((), 2, [6, 6]))
    seen = cache.look(1, query[[6, 6]], key[[6, 6]], None, **options)
    assert torch.allclose(seen, expected[[6, 6]], atol=1e-5)
    assert sum(item.numel() for item in cache.row(0)[1]) == 7 * CHANNELS


def test_a_prompt_with_a_past_sees_it_and_the_row_holds_both():
    torch.manual_seed(0)
    query, key, value = draw(9, HEADS, CHANNELS), draw(9, GROUPS, CHANNELS), draw(9, GROUPS, CHANNELS)
    expected = whole(query, key, value)
    cache = KVCache(max_batch_size=2, max_sequence_length=16)
    cache.begin(step(((0, 6),), 0, range(6)))
    cache.look(1, query[:6], key[:6], value[:6])
    past = Past(length=4, layers=cache.row(0))
    cache.begin(Step(prompts=((1, 5),), pasts=(past,), decoding=1, positions_T=torch.tensor([4, 5, 6, 7, 8, 6])))
    seen = cache.look(1, *(torch.cat([item[4:], item[6:7]]) for item in (query, key, value)))
    assert torch.allclose(seen, torch.cat([expected[4:], expected[6:7]]), atol=1e-5)
    assert cache.lengths_R[:2] == [7, 9] and torch.equal(cache.row(1)[1][0], key.transpose(0, 1))


def test_rows_are_copied_and_change_places_all_at_once():
    cache = KVCache(max_batch_size=3, max_sequence_length=4)
    for row in range(3):
        cache.begin(step(((row, 2),), 0, range(2)))
        cache.look(1, draw(2, HEADS, CHANNELS), torch.full((2, GROUPS, CHANNELS), row + 1.0), draw(2, GROUPS, CHANNELS))
    keys_RGSD, _ = cache._layers[1]
    cache.reorder([0, 1], [1, 0])
    assert [float(keys_RGSD[row, 0, 0, 0]) for row in range(3)] == [2.0, 1.0, 3.0]
    cache.copy_row(2, 0)
    assert [float(keys_RGSD[row, 0, 0, 0]) for row in range(3)] == [3.0, 1.0, 3.0]
    assert cache.lengths_R == [2, 2, 2]
