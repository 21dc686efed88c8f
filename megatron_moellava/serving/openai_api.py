"""OpenAI's chat completions as data: a body becomes a request (the way back is openai_answers.py).

Supported: text, image_url and video_url parts, max_tokens or max_completion_tokens, temperature, top_p, stop, seed, n,
logprobs, top_logprobs, response_format, stream, stream_options.include_usage.
A checkpoint with modalities takes their pictures as parts of their own, such as `depth_url`.
Two are ours: with `routing: true` the answer carries which experts every token went to, with `regions: true` the boxes, points
and polygons that it names, in pixels of the last picture as it was sent. A system message is put before the first user
message, since the template has a system prompt of its own. What would change the answer and is not supported is refused;
other unknown fields are ignored.
"""

import json
import math
import re
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

from megatron_moellava.config import DataConfig, DataError, Modality
from megatron_moellava.data.sample import IMAGE_PLACEHOLDER, Turn
from megatron_moellava.inference.grammar import ANY_OBJECT
from megatron_moellava.inference.requests import Request, Sampling
from megatron_moellava.serving.pictures import PictureLimits, open_url, open_video_url

# What would change an answer and is not done here, of OpenAI's fields and of those that other servers add.
ASKS_FOR_MORE = ("tools functions audio web_search_options logit_bias frequency_penalty presence_penalty min_p min_tokens "
                 "ignore_eos stop_token_ids bad_words allowed_token_ids use_beam_search prompt_logprobs continue_final_message "
                 "structured_outputs guided_json guided_regex guided_choice guided_grammar")  # fmt: skip
# Field -> values that change nothing, beside null, false, zero and what is empty.
REFUSED: dict[str, tuple] = {
    **dict.fromkeys(ASKS_FOR_MORE.split(), ()),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "repetition_penalty": (1,),
    "top_k": (-1,),
    "typical_p": (1,),
    "best_of": (1,),
    "length_penalty": (1,),
}
ROLES = ("system", "developer", "user", "assistant")
MEDIUM = "\0"  # stands for a picture or a video until it has been opened; no text holds it
DEFAULT_DATA = DataConfig()


def _picture(url: str, limits: PictureLimits, data: DataConfig, modality: Modality | None = None):
    return IMAGE_PLACEHOLDER, (open_url(url, limits, modality),)


def _openers(data: DataConfig) -> dict[str, Callable]:
    """Part of a message -> what makes (its text, its pictures) of its URL."""
    own = {f"{modality.name}_url": partial(_picture, modality=modality) for modality in data.modalities}
    return {"image_url": _picture, "video_url": open_video_url, **own}


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiLimits:
    """What one request may ask for; more is refused."""

    max_new_tokens: int = 1024
    default_new_tokens: int = 512
    max_images: int = 8  # pictures and videos of one request
    max_characters: int = 60_000  # of all texts of one request
    max_messages: int = 200
    max_answers: int = 16  # `n`; no more than the engine's rows either
    max_top_logprobs: int = 20
    max_schema_characters: int = 30_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest:
    """A body of /v1/chat/completions, checked."""

    request: Request
    stream: bool
    include_usage: bool
    regions: bool = False  # the answer carries the places that it names


def parse_chat(
    body: object, limits: ApiLimits, pictures: PictureLimits, data: DataConfig = DEFAULT_DATA
) -> ChatRequest:
    """A checked request; `data` says which frames of a video are shown. Raises DataError."""
    if not isinstance(body, dict):
        raise DataError("the body must be a JSON object")
    if refused := [name for name, neutral in REFUSED.items() if body.get(name) and body[name] not in neutral]:
        raise DataError(
            f"{refused[0]} is not supported by this server, and without it the answer would be another; leave it out"
        )
    openers = _openers(data)
    turns, media = _turns(body.get("messages"), limits, openers)
    options, sampling = body.get("stream_options"), _sampling(body, limits)
    routing = bool(body.get("routing", False))
    if routing and sampling.n > 1:
        raise DataError("routing is that of one answer; ask for n=1, or without it")
    opened = [openers[kind](url, pictures, data) for kind, url in media]
    request = Request(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        turns=_filled(turns, [text for text, _ in opened]),
        images=tuple(image for _, images in opened for image in images),
        sampling=sampling,
        record_routing=routing,
    )
    usage = isinstance(options, dict) and bool(options.get("include_usage"))
    return ChatRequest(
        request=request,
        stream=bool(body.get("stream", False)),
        include_usage=usage,
        regions=bool(body.get("regions", False)),
    )


def _sampling(body: dict, limits: ApiLimits) -> Sampling:
    default = limits.default_new_tokens
    tokens = body.get("max_completion_tokens") or body.get("max_tokens") or default
    tokens = _number({"max_tokens": tokens}, "max_tokens", default, 1, limits.max_new_tokens, whole=True)
    stop = body.get("stop") or ()
    stop = (stop,) if isinstance(stop, str) else stop
    if (
        not isinstance(stop, list | tuple)
        or len(stop) > 4
        or not all(isinstance(s, str) and 0 < len(s) <= 100 for s in stop)
    ):
        raise DataError("stop must be a string or a list of up to 4 strings of up to 100 characters")
    seed = _number(body, "seed", None, -(2**63), 2**63 - 1, whole=True)
    return Sampling(
        max_new_tokens=tokens,
        temperature=_number(body, "temperature", 0.0, 0.0, 2.0),
        top_p=_number(body, "top_p", 1.0, 1e-6, 1.0),
        stop=tuple(stop),
        seed=None if seed is None else seed % 2**63,
        n=_number(body, "n", 1, 1, limits.max_answers, whole=True),
        logprobs=_logprobs(body, limits),
        json_schema=_json_schema(body.get("response_format"), limits),
    )


def _json_schema(given: object, limits: ApiLimits) -> str:
    """The schema of `response_format` as JSON text; "" where any answer is welcome. `strict` is not asked: it always holds."""
    kind = given.get("type") if isinstance(given, dict) else given
    if kind is None or kind == "text":
        return ""
    if kind == "json_object":
        return ANY_OBJECT
    if not isinstance(given, dict) or kind != "json_schema":
        raise DataError("response_format.type must be text, json_object or json_schema")
    holder = given.get("json_schema")
    if not isinstance(holder, dict) or not isinstance(holder.get("schema"), dict):
        raise DataError("response_format.json_schema must be an object with a name and a schema, itself an object")
    if not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", str(holder.get("name"))):
        raise DataError("response_format.json_schema.name must have 1 to 64 letters, digits, underscores or dashes")
    schema = json.dumps(holder["schema"])
    if len(schema) > limits.max_schema_characters:
        raise DataError(f"the JSON schema has {len(schema):,} characters, more than {limits.max_schema_characters:,}")
    return schema


def _logprobs(body: dict, limits: ApiLimits) -> int | None:
    """How many likeliest tokens are wanted at each place; None: not even the log-probability of the answer's own."""
    wanted = body.get("logprobs") or False
    if not isinstance(wanted, bool):
        raise DataError("logprobs must be true or false; top_logprobs says how many tokens")
    top = _number(body, "top_logprobs", None, 0, limits.max_top_logprobs, whole=True)
    if top is not None and not wanted:
        raise DataError("top_logprobs needs logprobs: true")
    return (top or 0) if wanted else None


def _number(body: dict, name: str, default, low: float, high: float, whole: bool = False):
    value = body.get(name)
    if value is None:
        return default
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or not low <= value <= high:
        raise DataError(f"{name} must be {'a whole number' if whole else 'a number'} between {low:g} and {high:g}")
    return value


def _filled(turns: tuple[Turn, ...], texts: list[str]) -> tuple[Turn, ...]:
    """The turns with what stands for each picture and video."""
    waiting = iter(texts)
    return tuple(Turn(role=turn.role, text=re.sub(MEDIUM, lambda _: next(waiting), turn.text)) for turn in turns)


def _turns(
    messages: object, limits: ApiLimits, kinds: Collection[str]
) -> tuple[tuple[Turn, ...], list[tuple[str, str]]]:
    """Alternating turns, and (kind, URL) of the pictures and videos in them, in order; MEDIUM stands for each."""
    if not isinstance(messages, list) or not 0 < len(messages) <= limits.max_messages:
        raise DataError(f"messages must be a list of 1 to {limits.max_messages} messages")
    turns: list[Turn] = []
    urls: list[tuple[str, str]] = []
    system: list[str] = []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise DataError(f"messages[{number}].role must be one of {', '.join(ROLES)}")
        text, found = _content(message.get("content"), number, kinds)
        if found and role != "user":
            raise DataError(f"messages[{number}]: only user messages may hold images and videos")
        urls += found
        if role in ("system", "developer"):
            system.append(text)
        elif turns and turns[-1].role == role:
            turns[-1] = Turn(role=role, text=f"{turns[-1].text}\n{text}")
        else:
            turns.append(Turn(role=role, text=text))
    if not turns or turns[0].role != "user" or turns[-1].role != "user":
        raise DataError("the first and the last message must be the user's")
    if system:
        turns[0] = Turn(role="user", text="\n".join([*system, turns[0].text]))
    if len(urls) > limits.max_images:
        raise DataError(f"{len(urls)} images and videos, more than {limits.max_images}")
    if (size := sum(len(turn.text) for turn in turns)) > limits.max_characters:
        raise DataError(f"{size:,} characters of text, more than {limits.max_characters:,}; shorten the conversation")
    return tuple(turns), urls


def _content(content: object, number: int, kinds: Collection[str]) -> tuple[str, list[tuple[str, str]]]:
    """(text with MEDIUM on a line for each picture or video, their kinds and URLs).

    One goes first, as in training; several stay where they are if text stands before one of them.
    """
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise DataError(f"messages[{number}].content must be a string or a list of parts")
    lines, urls = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            lines.append(_plain(part["text"], number))
        elif isinstance(kind, str) and kind in kinds:
            holder = part.get(kind)
            url = holder.get("url") if isinstance(holder, dict) else holder
            if not isinstance(url, str):
                raise DataError(f"messages[{number}]: {kind}.url must be a string")
            urls.append((kind, url))
            lines.append(MEDIUM)
        else:
            raise DataError(f"messages[{number}]: parts must be of type text, {' or '.join(kinds)}")
    if len(urls) < 2:
        lines.sort(key=lambda line: line != MEDIUM)
    return "\n".join([*lines, ""] if {*lines} == {MEDIUM} else lines), urls


def _plain(text: str, number: int) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"messages[{number}] is not valid Unicode") from None
    return text.replace(IMAGE_PLACEHOLDER, "< image >").replace(MEDIUM, "")
