"""The next turn of a conversation reads only what is new, and says what it would have said anyway."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_moellava import parallel
from megatron_moellava.config import MoEConfig
from megatron_moellava.data.sample import Turn
from megatron_moellava.inference.engine import Engine
from megatron_moellava.inference.prefix_cache import CONVERSATIONS, Entry, PrefixCache, common, identity
from megatron_moellava.inference.requests import Request
from tests.helpers.inference_models import ask, picture, tiny_engine, uncached

GIB = 0.01
TOLERANCE = 1e-5  # as of the logits


@pytest.fixture(autouse=True)
def _leave_no_groups():
    yield
    parallel.shutdown()


def next_turn(first: Request, answer: str, text: str = "Sure?", images: int = 0, **sampling) -> Request:
    turns = (*first.turns, Turn(role="assistant", text=answer), Turn(role="user", text="<image>\n" * images + text))
    pictures = (*first.images, *(picture(20 + number) for number in range(images)))
    sampling = replace(first.sampling, logprobs=2, **sampling)
    return replace(first, id="next", turns=turns, images=pictures, sampling=sampling)


def read_by(engine, request) -> tuple[int, object]:
    """(prompt tokens that the engine read, completion)."""
    before = engine.read_tokens
    (completion,) = engine.generate([request])
    return engine.read_tokens - before, completion


def assert_as_uncached(engine, request, completion) -> None:
    logprobs_TV = uncached(engine, request, completion.tokens).log_softmax(dim=-1)
    assert logprobs_TV.argmax(dim=-1).tolist() == list(completion.tokens)
    for item, expected_V in zip(completion.logprobs, logprobs_TV, strict=False):
        assert item.logprob == pytest.approx(float(expected_V[item.token]), abs=TOLERANCE)


@pytest.mark.parametrize("fast", [True, False], ids=["fast decoder", "modules"])
@pytest.mark.parametrize("backbone", ["llama-tiny", "qwen3-tiny"])
def test_the_second_turn_reads_only_itself(backbone, fast):
    engine = tiny_engine(MoEConfig(), backbone, prefix_cache=GIB)
    if not fast:
        engine.forward.fast_decoder = None
    first = ask(0, images=2)
    everything, answer = read_by(engine, first)
    prompt = engine.prompter(first)
    assert everything == len(prompt.tokens) and answer.num_cached_tokens == 0
    for images in (0, 1):
        second = next_turn(first, "red", images=images)
        read, completion = read_by(engine, second)
        tokens = engine.prompter(second).tokens
        assert read == len(tokens) - completion.num_cached_tokens
        assert completion.num_cached_tokens >= len(prompt.tokens) - 1, "the first turn was read again"
        assert_as_uncached(engine, second, completion)
    assert engine.forward.images_encoded == 3, "a picture was encoded again"


def test_the_same_words_about_another_picture_are_another_conversation():
    engine = tiny_engine(MoEConfig(), prefix_cache=GIB)
    read_by(engine, ask(0))
    other = replace(ask(5), sampling=replace(ask(5).sampling, logprobs=0))
    read, completion = read_by(engine, other)
    visual = engine.prompter(other).tokens.index(-200)
    assert completion.num_cached_tokens == visual == completion.num_prompt_tokens - read
    assert_as_uncached(engine, other, completion)


def test_neighbours_with_and_without_a_past_say_what_they_say_alone():
    requests = [ask(0, max_new_tokens=4), ask(1, images=2, max_new_tokens=7), ask(2, images=0, max_new_tokens=3)]
    later = [replace(next_turn(request, "so"), id=f"next {request.id}") for request in requests]
    later += [ask(7, record_routing=True), ask(8, n=2, temperature=1.2, seed=4)]
    plain = tiny_engine(MoEConfig(), max_batch_size=6)
    expected = {(item.request_id, item.index): (item.tokens, item.routing) for item in plain.generate(later)}
    parallel.shutdown()
    engine = tiny_engine(MoEConfig(), max_batch_size=6, prefix_cache=GIB)
    list(engine.generate(requests))
    found = {(item.request_id, item.index): (item.tokens, item.routing) for item in engine.generate(later)}
    assert found == expected and engine.cached_tokens > 0


def test_prompts_whose_gate_drops_choices_are_read_whole():
    moe = MoEConfig(
        num_moe_experts=8,
        router="original",
        moe_expert_capacity_factor=1.5,
        eval_capacity_factor=0.5,
        second_choice="deterministic",
    )
    engine = tiny_engine(moe, prefix_cache=GIB)
    read_by(engine, ask(0))
    read, completion = read_by(engine, next_turn(ask(0), "red"))
    assert completion.num_cached_tokens == 0 and read == completion.num_prompt_tokens


def test_words_that_are_embedded_differently_beside_a_picture_are_not_taken_over():
    built = tiny_engine(None, "minicpm-tiny")
    run = built.model.run
    built.model.run = replace(run, model=replace(run.model, scale_multimodal_embeddings=False))
    engine = Engine(built.model, built.prompter, prefix_cache=GIB)
    read_by(engine, ask(0, images=0))
    request = next_turn(ask(0, images=0), "red", images=1)
    _, completion = read_by(engine, request)
    assert completion.num_cached_tokens == 0
    assert_as_uncached(engine, request, completion)


def entry(*ids: int, kind: bool = False) -> Entry:
    return Entry(kind, np.array(ids), {1: (torch.zeros(1, len(ids), 2), torch.zeros(1, len(ids), 2))})


def test_the_longest_beginning_is_found_but_never_a_whole_prompt():
    cache = PrefixCache(limit=100, bytes_per_position=1)
    for ids in ((1, 2, 3), (1, 2, 9, 9), (7, 8)):
        cache.keep(entry(*ids))
    assert cache.find(np.array([1, 2, 9, 4]), False).length == 3
    assert cache.find(np.array([1, 2, 3]), False).length == 2, "the last token's logits are wanted"
    assert cache.find(np.array([5, 1, 2]), False) is None and cache.find(np.array([1, 2, 3]), True) is None


def test_beginnings_of_a_new_entry_go_and_then_the_one_not_used_for_longest():
    cache = PrefixCache(limit=8, bytes_per_position=1)
    cache.keep(entry(1, 2))
    cache.keep(entry(1, 2, 3))
    assert [len(item.ids_S) for item in cache.entries] == [3]
    cache.keep(entry(1, 2))
    assert len(cache.entries) == 1, "a known beginning"
    cache.keep(entry(7, 7, 7))
    cache.find(np.array([1, 2, 3, 4]), False)
    cache.keep(entry(8, 8, 8))
    assert [list(item.ids_S) for item in cache.entries] == [[1, 2, 3], [8, 8, 8]] and cache.bytes == 6
    cache.keep(entry(*range(9)))
    assert cache.bytes == 6, "one that is too long alone drives nobody out"
    cache.limit = 10**6
    for number in range(CONVERSATIONS + 5):
        cache.keep(entry(10, number))
    assert len(cache.entries) == CONVERSATIONS


def test_a_picture_is_its_pixels_and_not_its_place():
    engine = tiny_engine()
    first, same, other = (identity(engine.prompter(ask(number))) for number in (0, 0, 1))
    visual = engine.prompter(ask(0)).tokens.index(-200)
    assert (first == same).all() and common(first, other) == visual
    assert (first[visual] < 0) and len(set(first[first < 0].tolist())) == int((first < 0).sum())
