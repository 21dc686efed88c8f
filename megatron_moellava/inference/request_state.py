"""One request while it runs: what it has said, and whether that ends it."""

from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_moellava.inference.prompts import Prompt
from megatron_moellava.inference.requests import Completion, Event, Request
from megatron_moellava.inference.routing_record import RoutingRecord
from megatron_moellava.inference.sampling import Beam, BeamSearch, draw
from megatron_moellava.inference.text import TextStream


@dataclass(slots=True)
class RequestState:
    """A request in the engine, from its prompt to its last token."""

    request: Request
    prompt: Prompt
    stop_ids: frozenset[int]
    stream: TextStream
    random: torch.Generator
    rows: list[int] = field(default_factory=list)  # cache rows; one for each beam
    beams: BeamSearch | None = None
    record: RoutingRecord | None = None
    finish_reason: str = ""
    num_steps: int = 0  # of a beam search

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        if sampling.num_beams > 1:
            ends = self.stream.ends if self.stream.stop else None
            self.beams = BeamSearch(sampling.num_beams, sampling.length_penalty, ends)

    @property
    def width(self) -> int:
        """Cache rows it needs."""
        return self.request.sampling.num_beams

    @property
    def most_tokens(self) -> int:
        """Positions that each of its rows may come to hold."""
        return len(self.prompt.tokens) + self.request.sampling.max_new_tokens

    @property
    def has_images(self) -> bool:
        """Whether its prompt holds visual tokens."""
        return bool(self.prompt.tiles)

    def choose(self, logits_KV: torch.Tensor, likeliest: int) -> int | list[Beam]:
        """The next token, or the proposals of a beam search, from the logits of its rows."""
        if self.beams is not None:
            return self.beams.propose(logits_KV, self.stop_ids)
        if self.request.sampling.temperature == 0.0:
            return likeliest
        return draw(logits_KV[0], self.request.sampling, self.random)

    def accept(self, choice: Any) -> tuple[str, list[int]]:
        """Take over what `choose` chose; returns (text that is certain now, source of each row where beams changed places)."""
        if self.beams is not None:
            self.num_steps += 1
            is_last = self.num_steps == self.request.sampling.max_new_tokens
            sources = self.beams.advance(choice, self.stop_ids, is_last)
            if self.beams.is_done():
                best = self.beams.best()
                self.finish_reason = "stop" if best[-1] in self.stop_ids or self.stream.ends(best) else "length"
            return "", sources
        delta = ""
        if choice in self.stop_ids:
            self.finish_reason = "stop"
            self.stream.tokens.append(choice)
        else:
            delta = self.stream.add(choice)
            if self.stream.stopped:
                self.finish_reason = "stop"
            elif len(self.stream.tokens) >= self.request.sampling.max_new_tokens:
                self.finish_reason = "length"
        return delta, []

    def next_tokens(self) -> list[int]:
        """The token that each of its rows reads next."""
        return [tokens[-1] for tokens in self.beams.tokens] if self.beams is not None else [self.stream.tokens[-1]]

    def complete(self) -> Event:
        """The last event."""
        if self.beams is not None:
            best = self.beams.best()
            delta = "".join(self.stream.add(token) for token in best if token not in self.stop_ids)
            tokens = tuple(best)
        else:
            delta, tokens = "", tuple(self.stream.tokens)
        ended = tokens and tokens[-1] in self.stop_ids
        self.stream.tokens = list(tokens[:-1] if ended else tokens)
        delta += self.stream.finish()
        completion = Completion(
            request_id=self.request.id,
            text=self.stream.text,
            tokens=tokens,
            finish_reason=self.finish_reason,
            num_prompt_tokens=len(self.prompt.tokens),
            routing=self.record.table(self.prompt, self.stream) if self.record else None,
        )
        return Event(request_id=self.request.id, delta=delta, completion=completion)
