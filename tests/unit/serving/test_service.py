"""The engine in a thread of its own: callers that read, leave, and a failure that all of them hear of."""

import asyncio

import pytest

from megatron_moellava import parallel
from megatron_moellava.serving.service import EngineFailed, Service
from tests.helpers.inference_models import ask, tiny_engine


@pytest.fixture
def service():
    engine = tiny_engine(max_batch_size=2)
    running = Service(engine)
    running.start()
    yield running
    running.stop()
    parallel.shutdown()


async def answer(service: Service, request) -> tuple[str, object]:
    request, prompt = service.engine.fit(request)
    text, completion = "", None
    async for event in service.events(request, prompt):
        text, completion = text + event.delta, event.completion
    return text, completion


def test_callers_get_their_own_answers_at_the_same_time(service):
    async def both():
        return await asyncio.gather(answer(service, ask(0)), answer(service, ask(1, images=0, max_new_tokens=3)))

    (first, done), (second, other) = asyncio.run(both())
    assert (first, second) == (done.text, other.text) and (done.request_id, other.request_id) == ("r0", "r1")
    assert len(other.tokens) <= 3 and service.open_requests == 0


def test_a_caller_that_leaves_frees_its_row(service):
    async def leave():
        request, prompt = service.engine.fit(ask(0, max_new_tokens=400))
        events = service.events(request, prompt)
        await anext(events)
        await events.aclose()
        return await answer(service, ask(1, max_new_tokens=2))

    _, completion = asyncio.run(leave())
    assert completion.request_id == "r1" and service.open_requests == 0
    assert len(service.engine.rows) == 0


def test_a_failed_engine_is_told_to_who_waits_and_to_who_comes(service, monkeypatch):
    monkeypatch.setattr(service.engine, "step", lambda: 1 / 0)
    for _ in range(2):
        with pytest.raises(EngineFailed, match="ZeroDivisionError: division by zero"):
            asyncio.run(answer(service, ask(0)))
    assert service.failure
