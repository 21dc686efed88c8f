"""What Prometheus scrapes."""

from types import SimpleNamespace

from megatron_moellava.inference.requests import Completion
from megatron_moellava.serving.metrics import ServerMetrics
from tests.helpers.inference_models import ask


def service(**changes) -> SimpleNamespace:
    engine = SimpleNamespace(waiting=[1, 2], rows=[1], steps=7, cached_tokens=11)
    return SimpleNamespace(**{"engine": engine, "open_requests": 3, "failure": ""} | changes)


def numbers(metrics: ServerMetrics) -> dict[str, float]:
    lines = [line for line in metrics.text().decode().splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_gauges_are_read_when_they_are_scraped():
    state = service()
    metrics = ServerMetrics(state)
    found = numbers(metrics)
    assert (found["moellava_open_requests"], found["moellava_waiting_requests"], found["moellava_rows"]) == (3, 2, 1)
    assert (found["moellava_steps"], found["moellava_healthy"]) == (7, 1)
    assert found["moellava_cached_prompt_tokens"] == 11
    state.failure, state.open_requests = "RuntimeError", 0
    found = numbers(metrics)
    assert (found["moellava_healthy"], found["moellava_open_requests"]) == (0, 0)


def test_answers_and_refusals_are_counted():
    metrics = ServerMetrics(service())
    completion = Completion(request_id="r", text="x", tokens=(1, 2, 3), finish_reason="stop", num_prompt_tokens=40)
    metrics.answered(ask(0, images=2), [completion], seconds=0.2, first=0.07)
    metrics.refused(429)
    found = numbers(metrics)
    assert found['moellava_requests_total{status="200"}'] == found['moellava_requests_total{status="429"}'] == 1
    assert (found["moellava_prompt_tokens_total"], found["moellava_generated_tokens_total"]) == (40, 3)
    assert found["moellava_images_total"] == 2
    assert found['moellava_request_seconds_bucket{le="0.1"}'] == 0
    assert (
        found['moellava_request_seconds_bucket{le="0.25"}']
        == 1
        == found['moellava_first_token_seconds_bucket{le="0.1"}']
    )


def test_two_servers_of_one_process_count_apart():
    first, second = ServerMetrics(service()), ServerMetrics(service())
    first.refused(400)
    assert 'moellava_requests_total{status="400"}' not in numbers(second)
