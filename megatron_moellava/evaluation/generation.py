"""The benchmark runner's engine over a checkpoint: its requests become those of inference/."""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from PIL import Image

from megatron_moellava.config import DataConfig
from megatron_moellava.data.placeholders import IMAGE_PLACEHOLDER, any_of
from megatron_moellava.evaluation.runner import Answer, Request
from megatron_moellava.inference.engine import Engine
from megatron_moellava.inference.regions import locate_answer
from megatron_moellava.inference.requests import Completion, Sampling
from megatron_moellava.inference.requests import Request as GenerationRequest

AHEAD = 8  # requests waiting: pictures are opened when their turn is near, not all at the start


def completions(engine: Engine, requests: Iterable[GenerationRequest]) -> Iterator[Completion]:
    """One completion per request, each as soon as it is finished; requests are taken one by one, as places come free.

    Every process of the run calls it, also without a request of its own. An answer ends where the model's positions do.
    """
    todo = iter(requests)
    while True:
        while len(engine.waiting) < AHEAD and (request := next(todo, None)) is not None:
            engine.submit(*engine.fit(request))
        if not engine.anyone_busy():
            return
        yield from (event.completion for event in engine.step() if event.completion is not None)


class CheckpointAnswers:
    """Satisfies runner.Engine. Every process of the run calls `generate`, also without a question of its own."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def generate(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """One answer per request, each as soon as it is finished."""
        shown: dict[str, GenerationRequest] = {}

        def translated() -> Iterator[GenerationRequest]:
            for request in requests:
                shown[request.id] = _translated(request, self.engine.prompter.data)
                yield shown[request.id]

        for completion in completions(self.engine, translated()):
            asked = shown.pop(completion.request_id)
            text = completion.text.strip()
            named = locate_answer(text, asked.images, self.engine.prompter, asked.image_aspect_ratio)
            regions = tuple(place.data() for place in named)
            yield Answer(request_id=completion.request_id, text=text, regions=regions)


def _translated(request: Request, data: DataConfig) -> GenerationRequest:
    """With its pictures opened, and the frames of its videos in their place."""
    waiting: dict[str, deque] = {}
    for picture in request.images:
        waiting.setdefault(picture.placeholder, deque()).append(picture.show(data))
    images: list[Image.Image] = []

    def show(place: re.Match) -> str:
        if not waiting.get(place[0]):
            return IMAGE_PLACEHOLDER  # more places than pictures, which the prompter says
        text, found = waiting[place[0]].popleft()
        images.extend(found)
        return text

    turns = request.turns
    if waiting:
        pattern = any_of(waiting)
        turns = tuple(replace(turn, text=pattern.sub(show, turn.text)) for turn in turns)
    return GenerationRequest(
        id=request.id,
        turns=turns,
        images=tuple(images),
        sampling=Sampling(max_new_tokens=request.max_new_tokens, temperature=request.temperature),
        image_aspect_ratio=request.image_aspect_ratio,
    )
