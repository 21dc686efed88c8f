"""OpenAI's chat completions as data, the way back: what the engine says becomes answers and chunks."""

import time
from collections.abc import Callable, Sequence

from megatron_moellava.data.tokenizer import Tokenizer
from megatron_moellava.inference.requests import Completion, Event, TokenLogprobs

IMPOSSIBLE = -9999.0  # how OpenAI writes a log-probability that JSON has no number for


Places = Callable[[Completion], list[dict]]  # what finds the boxes, points and polygons that an answer names


def completion_object(
    completions: Sequence[Completion], model: str, tokenizer: Tokenizer, logprobs: bool, places: Places | None = None
) -> dict:
    """The answers to a request without streaming, in the order of their indices. `places`: where they were asked for."""
    completions = sorted(completions, key=lambda item: item.index)
    choices = [
        {
            "index": item.index,
            "message": {"role": "assistant", "content": item.text},
            "finish_reason": item.finish_reason,
            "logprobs": logprobs_object(item.logprobs, tokenizer) if logprobs else None,
            **_regions(item, places),
        }
        for item in completions
    ]
    return {
        **_envelope(completions[0].request_id, model, "chat.completion"),
        "choices": choices,
        "usage": usage(completions),
        **_routing(completions[0]),
    }


def first_chunk(request_id: str, model: str, index: int) -> dict:
    """The chunk that opens an answer: the role, no text."""
    return _chunk(request_id, model, index, {"role": "assistant", "content": ""}, None)


def delta_chunk(event: Event, model: str, tokenizer: Tokenizer) -> dict:
    """A chunk with the next piece of text, and the log-probabilities of its tokens."""
    logprobs = logprobs_object(event.logprobs, tokenizer) if event.logprobs else None
    return _chunk(event.request_id, model, event.index, {"content": event.delta}, None, logprobs)


def last_chunk(completion: Completion, model: str, places: Places | None = None) -> dict:
    """The chunk that says why an answer ended. `places`: as in `completion_object`."""
    chunk = _chunk(completion.request_id, model, completion.index, {}, completion.finish_reason)
    chunk["choices"][0] |= _regions(completion, places)
    return chunk | _routing(completion)


def usage_chunk(completions: Sequence[Completion], model: str) -> dict:
    """The chunk with the token counts, for `stream_options.include_usage`."""
    envelope = _envelope(completions[0].request_id, model, "chat.completion.chunk")
    return {**envelope, "choices": [], "usage": usage(completions)}


def usage(completions: Sequence[Completion]) -> dict:
    """Token counts as OpenAI names them. Visual tokens count as prompt tokens, and the prompt of several answers once."""
    prompt, answer = completions[0].num_prompt_tokens, sum(len(item.tokens) for item in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": completions[0].num_cached_tokens},
    }


def logprobs_object(items: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict:
    """The `logprobs` of a choice. A token that is a part of a character shows as U+FFFD, and its `bytes` are right."""
    content = [
        {
            **_token(item.token, item.logprob, tokenizer),
            "top_logprobs": [_token(token, logprob, tokenizer) for token, logprob in item.top],
        }
        for item in items
    ]
    return {"content": content, "refusal": None}


def _token(token: int, logprob: float, tokenizer: Tokenizer) -> dict:
    piece = tokenizer.piece(token)
    return {
        "token": piece.decode("utf-8", "replace"),
        "logprob": max(logprob, IMPOSSIBLE),
        "bytes": list(piece),
    }


def _regions(completion: Completion, places: Places | None) -> dict:
    return {} if places is None else {"regions": places(completion)}


def _routing(completion: Completion) -> dict:
    return {"routing": completion.routing} if completion.routing else {}


def _chunk(
    request_id: str, model: str, index: int, delta: dict, finish_reason: str | None, logprobs: dict | None = None
) -> dict:
    choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
    return {**_envelope(request_id, model, "chat.completion.chunk"), "choices": [choice]}


def _envelope(request_id: str, model: str, kind: str) -> dict:
    return {"id": request_id, "object": kind, "created": int(time.time()), "model": model}
