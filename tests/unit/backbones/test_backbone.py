"""What follows from a backbone's fields."""

from dataclasses import replace

import pytest

from megatron_moellava.backbones import BACKBONES, FAMILIES


def test_a_sample_is_no_longer_than_positions_and_window_allow():
    llama = BACKBONES["llama-tiny"]
    assert replace(llama, max_position_embeddings=4096).context_length == 4096
    assert replace(llama, max_position_embeddings=32768, sliding_window=4096).context_length == 4096
    assert replace(llama, max_position_embeddings=2048, sliding_window=4096).context_length == 2048


@pytest.mark.parametrize("name", BACKBONES)
def test_heads_fit_the_width_and_the_groups(name):
    heads = BACKBONES[name].heads
    assert heads.num_attention_heads % heads.num_query_groups == 0
    assert heads.query_rows_per_group * heads.num_query_groups == heads.num_attention_heads * heads.kv_channels


def test_families_call_their_sizes_by_one_name_each():
    names = [size.name for family in FAMILIES for size in family.SIZES]
    assert len(names) == len(set(names)) == len(BACKBONES)
    assert all(size.hf.family == family.SIZES[0].hf.family for family in FAMILIES for size in family.SIZES)
