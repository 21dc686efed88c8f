"""What an answer comes with: log-probabilities, and other answers to the same prompt."""

import pytest
import torch

from megatron_moellava import parallel
from megatron_moellava.config import DataError, MoEConfig
from megatron_moellava.inference.sampling import sample_seed
from tests.helpers.inference_models import ask, mixed_requests, tiny_engine, uncached

TOLERANCE = 1e-5  # as of the logits


@pytest.fixture(autouse=True)
def _leave_no_groups():
    yield
    parallel.shutdown()


def drawn(number: int = 0, **sampling):
    return ask(number, **{"temperature": 1.5, "seed": 3, "max_new_tokens": 9} | sampling)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "top_p": 0.9, "seed": 5}], ids=["greedy", "drawn"])
def test_logprobs_are_the_log_softmax_of_a_plain_forward_pass(sampling):
    engine = tiny_engine(MoEConfig(), max_batch_size=3)
    requests = [ask(0, logprobs=4, **sampling), ask(1, images=2, logprobs=0, **sampling), ask(2, **sampling)]
    done = {completion.request_id: completion for completion in engine.generate(requests)}
    assert done["r2"].logprobs == ()
    for request in requests[:2]:
        completion = done[request.id]
        expected_TV = uncached(engine, request, completion.tokens).log_softmax(dim=-1)
        said = [token for token in completion.tokens if token not in engine.prompter.stop_ids]
        assert [item.token for item in completion.logprobs] == said != []
        for item, expected_V in zip(completion.logprobs, expected_TV, strict=False):
            assert item.logprob == pytest.approx(float(expected_V[item.token]), abs=TOLERANCE)
            values, tokens = expected_V.topk(request.sampling.logprobs)
            assert [token for token, _ in item.top] == tokens.tolist()
            assert [value for _, value in item.top] == pytest.approx(values.tolist(), abs=TOLERANCE)


def test_streamed_logprobs_come_with_their_text_and_end_before_a_stop_string():
    engine = tiny_engine()
    (whole,) = engine.generate([drawn(max_new_tokens=14)])
    middle = len(whole.text) // 2
    mark = whole.text[middle : middle + 3]
    assert whole.text.index(mark) > 2
    events = list(engine.stream(drawn(max_new_tokens=14, stop=(mark,), logprobs=1)))
    streamed = [item for event in events for item in event.logprobs]
    assert tuple(streamed) == events[-1].completion.logprobs and len(streamed) < len(events[-1].completion.tokens)
    text, pieces = events[-1].completion.text, [engine.prompter.tokenizer.piece(item.token) for item in streamed]
    assert b"".join(pieces).decode(errors="replace").lstrip().startswith(text)
    assert len(b"".join(pieces[:-1]).decode(errors="replace").lstrip()) < len(text), (
        "a token of the stop string is there"
    )


def test_several_answers_are_those_of_their_own_seeds_and_read_the_prompt_once():
    engine = tiny_engine(MoEConfig(), max_batch_size=4)
    answers = {completion.index: completion for completion in engine.generate([drawn(n=3)])}
    assert sorted(answers) == [0, 1, 2] and len({item.tokens for item in answers.values()}) == 3
    assert engine.read_tokens == len(engine.prompter(drawn()).tokens) and engine.forward.images_encoded == 1
    for index, completion in answers.items():
        (alone,) = engine.generate([drawn(seed=sample_seed(3, index))])
        assert (alone.tokens, alone.finish_reason) == (completion.tokens, completion.finish_reason)
    assert not engine.rows


def test_several_answers_wait_for_their_rows_and_disturb_nobody():
    engine = tiny_engine(MoEConfig(), max_batch_size=4)
    requests = [*mixed_requests()[:3], drawn(9, n=3), drawn(8, n=2, logprobs=2)]
    alone = {}
    for request in requests:
        alone |= {(item.request_id, item.index): item.tokens for item in engine.generate([request])}
    together = {(item.request_id, item.index): item.tokens for item in engine.generate(requests)}
    assert together == alone and len(together) == 8


def test_cancelling_ends_all_answers_of_a_request():
    engine = tiny_engine(max_batch_size=4)
    engine.submit(drawn(n=3, max_new_tokens=200))
    engine.submit(ask(1))
    engine.step()
    engine.cancel("r0")
    assert [running.request.id for running in engine.rows] == ["r1"]


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"n": 5}, "n=5 must lie between 1 and 4"),
        ({"n": 0}, "n=0"),
        ({"n": 2, "num_beams": 2}, "beam search"),
        ({"logprobs": 1, "num_beams": 2}, "beam search"),
    ],
)
def test_answers_that_cannot_be_given_are_refused(sampling, message):
    with pytest.raises(DataError, match=message):
        tiny_engine(max_batch_size=4).submit(ask(0, **sampling))


def test_the_first_answers_seed_is_the_requests_own_and_the_others_are_far_apart():
    seeds = {sample_seed(seed, index) for seed in range(50) for index in range(16)}
    assert len(seeds) == 800 and sample_seed(7, 0) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert torch.Generator().manual_seed(max(seeds))
