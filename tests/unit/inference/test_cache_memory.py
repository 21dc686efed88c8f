"""The cache holds what the requests hold: it grows in blocks, forgets, and never takes more than it may."""

import pytest
import torch

from megatron_moellava import parallel
from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import ConfigError, DataError
from megatron_moellava.inference.cache_memory import GIB, CacheMemory
from megatron_moellava.model import kv_cache
from tests.helpers.inference_models import ask, mixed_requests, tiny_engine


@pytest.fixture(autouse=True)
def _leave_no_groups():
    yield
    parallel.shutdown()


def answers(engine, requests) -> dict[str, tuple[int, ...]]:
    return {completion.request_id: completion.tokens for completion in engine.generate(requests)}


def held_bytes(engine) -> int:
    return sum(item.nbytes for layer in engine.cache._layers.values() for item in layer)


def test_growing_in_small_blocks_changes_no_token(monkeypatch):
    """Rows and blocks come one at a time, while answers of different lengths run and beams change places."""
    requests = [*mixed_requests(), ask(90, num_beams=3, max_new_tokens=9), ask(91, max_new_tokens=30)]
    whole = answers(tiny_engine(max_batch_size=5), requests)
    parallel.shutdown()
    monkeypatch.setattr(kv_cache, "GROWTH", 3)
    engine = tiny_engine(max_batch_size=5)
    assert answers(engine, requests) == whole
    assert engine.cache.held[1] < engine.max_sequence_length


def test_a_position_of_multi_latent_attention_is_a_latent_and_what_positions_rotate():
    backbone = get_backbone("deepseek-v2-tiny")
    engine = tiny_engine(backbone.moe, "deepseek-v2-tiny", max_batch_size=2)
    engine.generate([ask(0, max_new_tokens=3)])
    memory = CacheMemory.of(engine.model, None)
    assert memory.bytes_per_position == backbone.num_layers * (48 + 8) * 4
    assert memory.size(*engine.cache.held) == held_bytes(engine)


def test_the_cache_is_as_large_as_its_requests():
    engine = tiny_engine(max_batch_size=32)
    (completion,) = engine.generate([ask(0, max_new_tokens=4)])
    assert engine.cache.held == (1, kv_cache.GROWTH), f"{completion.num_prompt_tokens} tokens of prompt"
    assert held_bytes(engine) == engine.memory.size(1, completion.num_prompt_tokens + 4)


def test_a_request_that_has_no_room_beside_the_others_waits(monkeypatch):
    monkeypatch.setattr("megatron_moellava.inference.cache_memory.GROWTH", 1)
    monkeypatch.setattr(kv_cache, "GROWTH", 1)
    requests = [ask(number, max_new_tokens=6) for number in range(4)]
    engine = tiny_engine(max_batch_size=4)
    expected = answers(engine, requests)
    longest = max(len(engine.prepare(request).tokens) + 6 for request in requests)
    limit = engine.memory.size(2, longest)
    parallel.shutdown()

    engine, most = tiny_engine(max_batch_size=4, memory_limit=limit / GIB), 0
    for request in requests:
        engine.submit(request)
    found = {}
    while engine.busy:
        found |= {event.request_id: event.completion.tokens for event in engine.step() if event.completion}
        most = max(most, held_bytes(engine))
        assert len(engine.rows) <= 2
    assert found == expected
    assert 0 < most <= limit


def test_a_request_larger_than_the_limit_is_refused_with_both_sizes():
    engine = tiny_engine(memory_limit=1e-9)
    with pytest.raises(DataError, match=r"1 row\(s\) of \d+ tokens need .* GiB .*limit is 0.00 GiB.*--memory-limit"):
        engine.submit(ask(0))


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="--memory-limit=0 must be more than 0"):
        tiny_engine(memory_limit=0.0)


def test_the_published_sizes_at_once_are_what_no_gpu_has():
    """Keys and values of Llama-3.1-8B, 8 groups of 128 channels in 32 layers of bf16: 128 KiB for each position."""
    memory = CacheMemory(bytes_per_position=2 * 32 * 8 * 128 * torch.bfloat16.itemsize, limit=80 * GIB)
    assert memory.size(32, 131_072) == 512 * GIB and not memory.fits(32, 131_072)
    assert memory.size(32, 1_000) == 4 * GIB
