"""The benchmark runner's engine over a checkpoint: its requests become those of inference/."""

from collections.abc import Iterator, Sequence

from megatron_moellava.evaluation.runner import Answer, Request
from megatron_moellava.inference.engine import Engine
from megatron_moellava.inference.requests import Request as GenerationRequest
from megatron_moellava.inference.requests import Sampling

AHEAD = 8  # requests waiting: pictures are opened when their turn is near, not all at the start


class CheckpointEngine:
    """Satisfies runner.Engine. Every process of the run calls `generate`, also without a question of its own."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def generate(self, requests: Sequence[Request]) -> Iterator[Answer]:
        todo = iter(requests)
        left = len(requests)
        while True:
            while left and len(self.engine.waiting) < AHEAD:
                self.engine.submit(self._translated(next(todo)))
                left -= 1
            if not self.engine.anyone_busy():
                return
            for event in self.engine.step():
                if event.completion is not None:
                    yield Answer(request_id=event.request_id, text=event.completion.text)

    def _translated(self, request: Request) -> GenerationRequest:
        return GenerationRequest(
            id=request.id,
            turns=request.turns,
            images=tuple(picture.open() for picture in request.images),
            sampling=Sampling(max_new_tokens=request.max_new_tokens, temperature=request.temperature),
            image_aspect_ratio=request.image_aspect_ratio,
        )
