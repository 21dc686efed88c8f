"""Requests as plain data."""

import dataclasses
import pickle

import pytest

from megatron_moellava.inference.requests import Completion, Event, Request, Sampling
from tests.helpers.inference_models import ask


def test_an_answer_is_greedy_unless_something_else_is_asked_for():
    sampling = Request(id="a", turns=()).sampling
    assert (sampling.temperature, sampling.num_beams, sampling.top_p, sampling.stop) == (0.0, 1, 1.0, ())


def test_a_request_travels_between_processes_and_is_not_changed_on_the_way():
    request = ask(1)
    received = pickle.loads(pickle.dumps(request))  # noqa: S301  as torch.distributed sends it
    assert (received.id, received.turns, received.sampling) == (request.id, request.turns, request.sampling)
    assert received.images[0].tobytes() == request.images[0].tobytes()
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.id = "b"


def test_only_the_last_event_carries_a_completion():
    completion = Completion(request_id="a", text="x", tokens=(1,), finish_reason="stop", num_prompt_tokens=3)
    assert Event(request_id="a", delta="x").completion is None
    assert Event(request_id="a", delta="", completion=completion).completion.text == "x"
    assert Sampling() == Sampling()
