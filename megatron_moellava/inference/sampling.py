"""Logits -> the next token of a request. Shapes: V vocabulary, K beams."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from megatron_moellava import platform
from megatron_moellava.inference.requests import Sampling, TokenLogprobs


def likeliest_tokens(logits_LV: torch.Tensor) -> list[int]:
    """The argmax of each row. NumPy's is ten times as fast as torch's on a CPU (8 x 32,000: 19 against 216 us)."""
    if platform.HAS_CUDA:
        return logits_LV.argmax(dim=-1).tolist()
    return logits_LV.float().numpy().argmax(axis=-1).tolist()


def draw(logits_V: torch.Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """A token at a temperature, from the smallest set of tokens whose probabilities reach top_p (arXiv 1904.09751)."""
    probs_V = (logits_V.float() / sampling.temperature).softmax(dim=-1).cpu()
    if sampling.top_p < 1.0:
        sorted_V, order_V = probs_V.sort(descending=True)
        before_V = sorted_V.cumsum(dim=0) - sorted_V
        probs_V[order_V[before_V >= sampling.top_p]] = 0.0
    return int(torch.multinomial(probs_V, 1, generator=random))


def sample_seed(seed: int, index: int) -> int:
    """The seed of a request's answer number `index`, far from those of neighbouring seeds; the first one's is `seed`."""
    return (seed + index * 0x9E3779B97F4A7C15) % 2**63 if index else seed


def token_logprobs(logits_V: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    """The log-probabilities of a chosen token and of the `count` likeliest ones."""
    logprobs_V = logits_V.float().log_softmax(dim=-1)
    values, tokens = (item.tolist() for item in logprobs_V.topk(min(count, len(logprobs_V))))
    top = tuple(zip(tokens, values, strict=True))
    return TokenLogprobs(token=token, logprob=float(logprobs_V[token]), top=top)


@dataclass(frozen=True, slots=True)
class Choice:
    """What the last stage chose for one answer, and the other ranks hear."""

    token: int
    logprobs: TokenLogprobs | None = None  # where they were asked for
    failure: str = ""  # there is no token, and this is why


SPELLINGS = 16  # tokens that may complete a stop string, beside the stop tokens: "\n", "\n\n", ".\n", ...


@dataclass(frozen=True, slots=True)
class Beam:
    """One continuation that a beam search keeps."""

    source: int  # which of the K beams it continues
    token: int
    score: float  # sum of log-probabilities


@dataclass(slots=True)
class BeamSearch:
    """The K most likely beginnings of one request, and its finished answers, as in transformers' beam search."""

    num_beams: int
    length_penalty: float
    ends: Callable[[list[int]], bool] | None = None  # whether an answer is over although its last token is no stop
    tokens: list[list[int]] = field(default_factory=list)  # of each running beam
    scores: list[float] = field(default_factory=list)
    finished: list[tuple[float, list[int]]] = field(default_factory=list)  # (final score, tokens), at most K

    def propose(self, logits_KV: torch.Tensor, stop_ids: frozenset[int]) -> list[Beam]:
        """The best continuations: enough that K of them go on even if every beam's best one is an end.

        The first call brings one row, the prompt's.
        """
        scores_KV = logits_KV.float().log_softmax(dim=-1)
        if self.scores:
            scores_KV = scores_KV + torch.tensor(self.scores, device=scores_KV.device)[:, None]
        spare = SPELLINGS if self.ends else 0
        count = min(self.num_beams * (1 + len(stop_ids) + spare), scores_KV.numel())
        best, index = (item.tolist() for item in scores_KV.flatten().topk(count))
        size = scores_KV.shape[1]
        return [Beam(at // size, at % size, score) for score, at in zip(best, index, strict=True)]

    def advance(self, proposed: list[Beam], stop_ids: frozenset[int], is_last: bool = False) -> list[int]:
        """Take the proposals over; returns the source of each beam that goes on. The last step ends all of them."""
        before = self.tokens or [[]]
        going: list[Beam] = []
        for rank, beam in enumerate(proposed):
            if is_last or self._is_end(before[beam.source], beam.token, stop_ids):
                if rank < self.num_beams:  # an end that is not among the K best is none
                    self._finish(beam.score, [*before[beam.source], beam.token])
            elif len(going) < self.num_beams:
                going.append(beam)
        if going:  # so that every cache row has a beam
            going += [replace(going[-1], score=float("-inf"))] * (self.num_beams - len(going))
        self.tokens = [[*before[beam.source], beam.token] for beam in going]
        self.scores = [beam.score for beam in going]
        return [beam.source for beam in going]

    def _is_end(self, before: list[int], token: int, stop_ids: frozenset[int]) -> bool:
        return token in stop_ids or (self.ends is not None and self.ends([*before, token]))

    def _finish(self, score: float, tokens: list[int]) -> None:
        self.finished.append((score / len(tokens) ** self.length_penalty, tokens))
        self.finished = sorted(self.finished, key=lambda item: item[0], reverse=True)[: self.num_beams]

    def is_done(self) -> bool:
        """No running beam can still beat the worst of K finished ones, or none is left."""
        if not self.tokens:
            return True
        if len(self.finished) < self.num_beams:
            return False
        length = len(self.tokens[0])
        return max(self.scores) / length**self.length_penalty <= self.finished[-1][0]

    def best(self) -> list[int]:
        """The best of the finished answers."""
        return self.finished[0][1]
