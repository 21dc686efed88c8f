"""What Prometheus scrapes."""

from collections.abc import Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from megatron_moellava.inference.requests import Completion, Request
from megatron_moellava.serving.service import Service

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServerMetrics:
    """Counters and histograms of the server; gauges read the service when they are scraped."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, service: Service):
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("moellava_requests", "Requests by status", ["status"], registry=registry)
        self.prompt_tokens = Counter("moellava_prompt_tokens", "Tokens read, visual ones included", registry=registry)
        self.answer_tokens = Counter("moellava_generated_tokens", "Tokens said", registry=registry)
        self.images = Counter("moellava_images", "Pictures received", registry=registry)
        self.seconds = Histogram(
            "moellava_request_seconds", "Until the answer ends", buckets=SECONDS, registry=registry
        )
        self.first = Histogram("moellava_first_token_seconds", "Until it begins", buckets=SECONDS, registry=registry)
        engine = service.engine
        for name, text, read in (
            ("moellava_open_requests", "Requests in the engine", lambda: service.open_requests),
            ("moellava_waiting_requests", "Requests without a cache row", lambda: len(engine.waiting)),
            ("moellava_rows", "Cache rows in use", lambda: len(engine.rows)),
            ("moellava_steps", "Forward passes so far", lambda: engine.steps),
            ("moellava_cached_prompt_tokens", "Not read again, so far", lambda: engine.cached_tokens),
            ("moellava_healthy", "0 when the engine has failed", lambda: int(not service.failure)),
        ):
            Gauge(name, text, registry=registry).set_function(read)

    def answered(self, request: Request, completions: Sequence[Completion], seconds: float, first: float) -> None:
        """Count an answered request. `seconds`: until its end; `first`: until its first token."""
        self.requests.labels("200").inc()
        self.prompt_tokens.inc(completions[0].num_prompt_tokens)
        self.answer_tokens.inc(sum(len(completion.tokens) for completion in completions))
        self.images.inc(len(request.images))
        self.seconds.observe(seconds)
        self.first.observe(first)

    def refused(self, status: int) -> None:
        """Count a refused request under its HTTP status."""
        self.requests.labels(str(status)).inc()

    def text(self) -> bytes:
        """What /metrics answers."""
        return generate_latest(self.registry)
