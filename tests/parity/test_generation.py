"""Greedy and beam search against transformers' generate on the same weights, token by token."""

import argparse

import pytest
import torch

from benchmarks import generation as benchmark
from megatron_moellava import parallel
from megatron_moellava.inference.requests import Request, Sampling


@pytest.fixture(scope="module", params=["dense", "moe"])
def pair(request, tmp_path_factory):
    """(transformers' model, our engine, prompts) over the same random weights, fp32."""
    folder = tmp_path_factory.mktemp("pair")
    args = argparse.Namespace(hidden=128, layers=4, experts=4, batch=4, new_tokens=12, dense=request.param == "dense")
    model = benchmark.write_reference(folder, args)
    engine = benchmark.open_engine(folder, 16, "fp32")
    yield model, engine, benchmark.make_jobs(engine, args, mixed=True)[:6]
    parallel.shutdown()


def test_greedy_answers_are_those_of_transformers(pair):
    model, engine, jobs = pair
    assert benchmark.ask_engine(engine, jobs) == benchmark.ask_transformers(model, jobs, batch=1)


@torch.no_grad()
def beams_of_transformers(model, job, **options) -> list[int]:
    ids = [benchmark.IMAGE_ID if token == benchmark.IMAGE_TOKEN else token for token in job.prompt.tokens]
    pixels = job.prompt.pixels_NCHW
    out = model.generate(input_ids=torch.tensor([ids]), pixel_values=pixels, do_sample=False, **options)
    return out[0, len(ids) :].tolist()


def beams_of_ours(engine, jobs, **options) -> list[list[int]]:
    for number, job in enumerate(jobs):
        engine.submit(Request(id=str(number), turns=(), sampling=Sampling(**options)), job.prompt)
    found = {}
    while engine.busy:
        found |= {e.request_id: list(e.completion.tokens) for e in engine.step() if e.completion is not None}
    return [found[str(number)] for number in range(len(jobs))]


@pytest.mark.parametrize("length_penalty", [1.0, 0.3])
@pytest.mark.parametrize("num_beams", [2, 4])
def test_beam_search_is_that_of_transformers(pair, num_beams, length_penalty):
    """Several requests at once, whose beams change places; half of the answers end by an end token."""
    model, engine, jobs = pair
    options = {"max_new_tokens": 10, "num_beams": num_beams, "length_penalty": length_penalty}
    endless = beams_of_ours(engine, jobs, **options)
    assert endless == [beams_of_transformers(model, job, **options) for job in jobs]
    engine.prompter.tokenizer.eos_id = end = endless[0][3]
    try:
        ended = beams_of_ours(engine, jobs, **options)
    finally:
        engine.prompter.tokenizer.eos_id = -1
    expected = [beams_of_transformers(model, job, **options, eos_token_id=end, pad_token_id=0) for job in jobs]
    assert any(end in answer for answer in ended)
    assert ended == expected
