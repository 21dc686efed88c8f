"""One forward pass of a step: which logits come out, and what is remembered of images."""

import pytest
import torch

from megatron_moellava.inference.forward import REMEMBERED_IMAGES
from megatron_moellava.model.kv_cache import Step
from tests.helpers.inference_models import ask, tiny_engine


@pytest.fixture
def engine():
    engine = tiny_engine(max_batch_size=2)
    yield engine
    from megatron_moellava import parallel

    parallel.shutdown()


def pass_over(engine, prompts, tokens=(), has_images=()):
    positions = [place for prompt in prompts for place in range(len(prompt.tokens))]
    positions += engine.cache.lengths_R[: len(tokens)]
    rows = tuple((len(tokens) + number, len(prompt.tokens)) for number, prompt in enumerate(prompts))
    step = Step(prompts=rows, decoding=len(tokens), positions_T=torch.tensor(positions))
    return engine.forward(step, prompts, tokens, has_images)


def test_a_step_gives_one_row_of_logits_per_prompt_and_per_token(engine):
    first, second = engine.prompter(ask(0)), engine.prompter(ask(1, images=0))
    assert pass_over(engine, [first]).shape == (1, engine.prompter.tokenizer.vocab_size)
    assert pass_over(engine, [second], [5], [True]).shape[0] == 2


def test_a_token_after_its_prompt_is_the_longer_prompts_last_token(engine):
    prompt = engine.prompter(ask(0))
    pass_over(engine, [prompt])
    continued = pass_over(engine, [], [17], [True])
    tokens_1S = torch.tensor([[*prompt.tokens, 17]])
    positions_1S = torch.arange(tokens_1S.shape[1])[None]
    with torch.no_grad():
        whole = engine.model(tokens_1S, positions_1S, pixels_NCHW=prompt.pixels_NCHW)[0, -1, : continued.shape[1]]
    assert torch.allclose(continued[0], whole, atol=1e-4)


def test_images_are_encoded_once_and_the_oldest_are_forgotten(engine):
    forward = engine.forward
    for _ in range(2):
        pass_over(engine, [engine.prompter(ask(0, images=2))])
    assert forward.images_encoded == 2 == len(forward.features)
    for number in range(1, REMEMBERED_IMAGES + 2):
        forward.features[str(number).encode()] = torch.zeros(1)
    pass_over(engine, [engine.prompter(ask(3, images=1))])
    assert len(forward.features) == REMEMBERED_IMAGES and b"1" not in forward.features
