"""One request while it runs: what it has said, and whether that ends it."""

from dataclasses import dataclass, field

import torch

from megatron_moellava.inference.grammar import Grammar, Grammars
from megatron_moellava.inference.prompts import Prompt, Prompter
from megatron_moellava.inference.requests import Completion, Event, Request, TokenLogprobs
from megatron_moellava.inference.routing_record import RoutingRecord
from megatron_moellava.inference.sampling import (
    Beam,
    BeamSearch,
    Choice,
    draw,
    likeliest_tokens,
    sample_seed,
    token_logprobs,
)
from megatron_moellava.inference.text import TextStream


@dataclass(slots=True)
class RequestState:
    """One answer of a request in the engine, from its prompt to its last token."""

    request: Request
    prompt: Prompt
    stop_ids: frozenset[int]
    stream: TextStream
    random: torch.Generator
    index: int = 0  # which of the request's answers
    rows: list[int] = field(default_factory=list)  # cache rows; one for each beam
    beams: BeamSearch | None = None
    record: RoutingRecord | None = None
    grammar: Grammar | None = None
    finish_reason: str = ""
    failure: str = ""
    num_cached: int = 0  # tokens of the prompt that were not read again
    num_steps: int = 0  # of a beam search
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of what has been said
    _held: list[tuple[int, TokenLogprobs]] = field(
        default_factory=list
    )  # (first character of the token, ...) of the rest

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

    def choose(self, logits_KV: torch.Tensor, likeliest: int) -> Choice | list[Beam]:
        """The next token, or the proposals of a beam search, from the logits of its rows."""
        if self.beams is not None:
            return self.beams.propose(logits_KV, self.stop_ids)
        sampling, open_1V = self.request.sampling, logits_KV
        if self.grammar is not None:
            allowed_V = self.grammar.allowed(logits_KV.shape[1])
            if failure := self.grammar.failure or ("" if allowed_V.any() else "no answer satisfies the schema"):
                return Choice(-1, failure=failure)
            open_1V = logits_KV.masked_fill(~allowed_V.to(logits_KV.device), float("-inf"))
            likeliest = likeliest_tokens(open_1V)[0]
        token = likeliest if sampling.temperature == 0.0 else draw(open_1V[0], sampling, self.random)
        return Choice(
            token, None if sampling.logprobs is None else token_logprobs(logits_KV[0], token, sampling.logprobs)
        )

    def accept(self, choice: Choice | list[Beam]) -> tuple[str, list[int]]:
        """Take over what `choose` chose; returns (text that is certain now, source of each row where beams changed places)."""
        if isinstance(choice, list):
            assert self.beams is not None
            self.num_steps += 1
            is_last = self.num_steps == self.request.sampling.max_new_tokens
            sources = self.beams.advance(choice, self.stop_ids, is_last)
            if self.beams.is_done():
                best = self.beams.best()
                self.finish_reason = "stop" if best[-1] in self.stop_ids or self.stream.ends(best) else "length"
            return "", sources
        delta = ""
        if choice.failure:
            self.finish_reason, self.failure = "error", choice.failure
        elif choice.token in self.stop_ids:
            self.finish_reason = "stop"
            self.stream.tokens.append(choice.token)
        else:
            if choice.logprobs is not None:
                self._held.append((self.stream.length, choice.logprobs))
            delta = self.stream.add(choice.token)
            if self.grammar is not None:
                self.grammar.advance(choice.token)
            if self.stream.stopped or (self.grammar is not None and self.grammar.is_complete):
                self.finish_reason = "stop"
            elif len(self.stream.tokens) >= self.request.sampling.max_new_tokens:
                self.finish_reason = "length"
        return delta, []

    def certain_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """Those of tokens whose text has begun to be certain since the last call, each token once."""
        new = tuple(item for start, item in self._held if start < self.stream.certain)
        del self._held[: len(new)]
        self.logprobs += new
        return new

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
        last = self.certain_logprobs()
        completion = Completion(
            request_id=self.request.id,
            text=self.stream.text,
            tokens=tokens,
            finish_reason=self.finish_reason,
            num_prompt_tokens=len(self.prompt.tokens),
            num_cached_tokens=self.num_cached,
            routing=self.record.table(self.prompt, self.stream) if self.record else None,
            index=self.index,
            logprobs=tuple(self.logprobs),
            failure=self.failure,
        )
        return Event(request_id=self.request.id, index=self.index, delta=delta, logprobs=last, completion=completion)


def answers_to(
    request: Request, prompt: Prompt, prompter: Prompter, grammars: Grammars, seed: int
) -> tuple[RequestState, ...]:
    """The `Sampling.n` answers of a request that begins. `seed`: of a request that names none."""
    sampling = request.sampling
    # A grammar knows its end, and the template's may stand inside a JSON string.
    ends = () if sampling.json_schema else prompter.stop_strings
    base = seed if sampling.seed is None else sampling.seed
    return tuple(
        RequestState(
            request=request,
            prompt=prompt,
            stop_ids=prompter.stop_ids,
            stream=TextStream(prompter.tokenizer, (*sampling.stop, *ends)),
            random=torch.Generator().manual_seed(sample_seed(base, index)),
            index=index,
            record=RoutingRecord() if request.record_routing else None,
            grammar=grammars.start(sampling.json_schema) if sampling.json_schema else None,
        )
        for index in range(sampling.n)
    )
