"""What is asked of the engine and what it says: plain data that travels between threads and processes."""

from dataclasses import dataclass, field

from PIL import Image

from megatron_moellava.data.sample import Turn


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the tokens of an answer are chosen and when it ends."""

    max_new_tokens: int = 512
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # the smallest set of tokens whose probabilities reach this is sampled from
    num_beams: int = 1  # above 1: beam search, without temperature
    length_penalty: float = 1.0  # beam search: score = sum of log-probabilities / length ** length_penalty
    stop: tuple[str, ...] = ()  # beside the template's own end
    seed: int | None = None  # of this request's draws; None: taken from the engine's


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One conversation to be continued."""

    id: str
    turns: tuple[Turn, ...]  # the last one is the user's; the template makes the prompt
    images: tuple[Image.Image, ...] = ()  # one for each <image> in the turns, in that order
    sampling: Sampling = field(default_factory=Sampling)
    image_aspect_ratio: str = "model"  # "model": as in training; "pad" or "square"
    record_routing: bool = False  # keep which experts every token went to


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The whole answer."""

    request_id: str
    text: str  # without the prompt and what ended it
    tokens: tuple[int, ...]  # generated, the end token included
    finish_reason: str  # "stop", "length" or "cancelled"
    num_prompt_tokens: int  # visual tokens included
    routing: dict | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something new about one request. The last event of a request carries its completion."""

    request_id: str
    delta: str  # text that is certain now
    completion: Completion | None = None
