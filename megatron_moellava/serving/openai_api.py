"""OpenAI's chat completions as data: a body becomes a request, events become chunks.

Supported: text, image_url and video_url parts, max_tokens or max_completion_tokens, temperature, top_p, stop, seed, stream,
stream_options.include_usage. Two are ours: with `routing: true` the answer carries which experts every token went to, with
`regions: true` the boxes, points and polygons that it names, in pixels of the last picture as it was sent. A system message is
put before the first user message, since the template has a system prompt of its own. What would change the answer and is not
supported is refused; other unknown fields are ignored.
"""

import math
import re
import time
import uuid
from dataclasses import dataclass

from megatron_moellava.config import DataConfig, DataError
from megatron_moellava.data.sample import IMAGE_PLACEHOLDER, Turn
from megatron_moellava.inference.requests import Completion, Request, Sampling
from megatron_moellava.serving.pictures import PictureLimits, open_url, open_video_url

REFUSED = ("tools", "tool_choice", "functions", "logprobs", "top_logprobs", "logit_bias", "response_format", "audio")
ROLES = ("system", "developer", "user", "assistant")
MEDIUM = "\0"  # stands for a picture or a video until it has been opened; no text holds it
DEFAULT_DATA = DataConfig()


def _picture(url: str, limits: PictureLimits, data: DataConfig):
    return IMAGE_PLACEHOLDER, (open_url(url, limits),)


_OPENERS = {"image_url": _picture, "video_url": open_video_url}  # part of a message -> (its text, its pictures)


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiLimits:
    """What one request may ask for; more is refused."""

    max_new_tokens: int = 1024
    default_new_tokens: int = 512
    max_images: int = 8  # pictures and videos of one request
    max_characters: int = 60_000  # of all texts of one request
    max_messages: int = 200


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
    if refused := [name for name in REFUSED if body.get(name)]:
        raise DataError(f"{refused[0]} is not supported by this server")
    if body.get("n") not in (None, 1):
        raise DataError("n must be 1")
    turns, media = _turns(body.get("messages"), limits)
    opened = [_OPENERS[kind](url, pictures, data) for kind, url in media]
    options = body.get("stream_options")
    request = Request(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        turns=_filled(turns, [text for text, _ in opened]),
        images=tuple(image for _, images in opened for image in images),
        sampling=_sampling(body, limits),
        record_routing=bool(body.get("routing", False)),
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
    )


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


def _turns(messages: object, limits: ApiLimits) -> tuple[tuple[Turn, ...], list[tuple[str, str]]]:
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
        text, found = _content(message.get("content"), number)
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


def _content(content: object, number: int) -> tuple[str, list[tuple[str, str]]]:
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
        elif kind in _OPENERS:
            holder = part.get(kind)
            url = holder.get("url") if isinstance(holder, dict) else holder
            if not isinstance(url, str):
                raise DataError(f"messages[{number}]: {kind}.url must be a string")
            urls.append((kind, url))
            lines.append(MEDIUM)
        else:
            raise DataError(f"messages[{number}]: parts must be of type text, {' or '.join(_OPENERS)}")
    if len(urls) < 2:
        lines.sort(key=lambda line: line != MEDIUM)
    return "\n".join([*lines, ""] if {*lines} == {MEDIUM} else lines), urls


def _plain(text: str, number: int) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"messages[{number}] is not valid Unicode") from None
    return text.replace(IMAGE_PLACEHOLDER, "< image >").replace(MEDIUM, "")


# --- answers ----------------------------------------------------------------------------------------------------------


def completion_object(completion: Completion, model: str, regions: list[dict] | None = None) -> dict:
    """The answer to a request without streaming. `regions`: the places that it names, where they were asked for."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": completion.text},
        "finish_reason": completion.finish_reason,
        "logprobs": None,
    }
    return {
        **_envelope(completion.request_id, model, "chat.completion"),
        "choices": [choice],
        **_extras(completion, True, regions),
    }


def first_chunk(request_id: str, model: str) -> dict:
    """The chunk that opens a stream: the role, no text."""
    return _chunk(request_id, model, {"role": "assistant", "content": ""}, None)


def delta_chunk(request_id: str, model: str, text: str) -> dict:
    """A chunk with the next piece of text."""
    return _chunk(request_id, model, {"content": text}, None)


def last_chunk(completion: Completion, model: str, regions: list[dict] | None = None) -> dict:
    """The chunk that says why the answer ended. `regions`: as in `completion_object`."""
    return {**_chunk(completion.request_id, model, {}, completion.finish_reason), **_extras(completion, False, regions)}


def usage_chunk(completion: Completion, model: str) -> dict:
    """The chunk with the token counts, for `stream_options.include_usage`."""
    return {
        **_envelope(completion.request_id, model, "chat.completion.chunk"),
        "choices": [],
        "usage": usage(completion),
    }


def usage(completion: Completion) -> dict:
    """Token counts as OpenAI names them; visual tokens count as prompt tokens."""
    prompt, answer = completion.num_prompt_tokens, len(completion.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _extras(completion: Completion, with_usage: bool, regions: list[dict] | None) -> dict:
    extras: dict = {"usage": usage(completion)} if with_usage else {}
    extras |= {} if regions is None else {"regions": regions}
    return extras | ({"routing": completion.routing} if completion.routing else {})


def _chunk(request_id: str, model: str, delta: dict, finish_reason: str | None) -> dict:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
    return {**_envelope(request_id, model, "chat.completion.chunk"), "choices": [choice]}


def _envelope(request_id: str, model: str, kind: str) -> dict:
    return {"id": request_id, "object": kind, "created": int(time.time()), "model": model}
