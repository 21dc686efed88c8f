"""What is asked of the engine and what it says: plain data that travels between threads and processes."""

from dataclasses import dataclass, field

from PIL import Image

from megatron_moellava.config import DataError
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
    logprobs: int | None = None  # keep each token's log-probability, and those of so many likeliest ones; None: none
    n: int = 1  # independent answers; the first one is drawn as if it were the only one
    json_schema: str = ""  # the answer is a JSON text that this schema (itself JSON text) allows; "": any answer


def check_sampling(sampling: Sampling, most_answers: int) -> None:
    """Raises DataError for settings without a meaning. `most_answers`: rows of the cache."""
    for name in ("num_beams", "n"):
        if not 1 <= (count := getattr(sampling, name)) <= most_answers:
            raise DataError(f"{name}={count} must lie between 1 and {most_answers}, the answers of one step")
    if sampling.num_beams > 1 and (sampling.n > 1 or sampling.logprobs is not None or sampling.json_schema):
        raise DataError("a beam search gives one free answer without logprobs; ask for num_beams=1")
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.max_new_tokens < 1:
        raise DataError("temperature must be at least 0, top_p in (0, 1], max_new_tokens at least 1")


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
class TokenLogprobs:
    """How likely one token of an answer was: natural logarithms, by the model alone, before temperature and top_p."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob) of the likeliest tokens there, best first


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The whole answer."""

    request_id: str
    text: str  # without the prompt and what ended it
    tokens: tuple[int, ...]  # generated, the end token included
    finish_reason: str  # "stop", "length" (a JSON answer is not complete then) or "error"
    num_prompt_tokens: int  # visual tokens included
    num_cached_tokens: int = 0  # of them, those that an earlier request has read
    routing: dict | None = None
    index: int = 0  # which of a request's `Sampling.n` answers
    logprobs: tuple[TokenLogprobs, ...] = ()  # of the tokens of `text`, where `Sampling.logprobs` asks for them
    failure: str = ""  # why an answer ended with "error"


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something new about one answer of a request. The last event of each answer carries its completion."""

    request_id: str
    delta: str  # text that is certain now
    completion: Completion | None = None
    index: int = 0  # which of a request's answers
    logprobs: tuple[TokenLogprobs, ...] = ()  # of the tokens that `delta` begins or ends
