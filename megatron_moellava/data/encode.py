"""Sample -> token ids and labels.

Two ways to the labels. "spans", the default, knows from the template which characters are answers and trains the
tokens that start in them. "original" is MoE-LLaVA's algorithm (specification 4.4): it tokenises the prompt, cuts it at
separators, tokenises the pieces again and counts. Both give the same wherever the original does not fail; it fails
(and silently masks the whole sample) when an answer is empty or a text contains a separator. Text is parsed for
special tokens only by "original".

Labels stay aligned with their token until `expand`, which also shifts: labels_S[t] is the target of position t.
"""

from dataclasses import dataclass

import numpy as np

from megatron_moellava.config import ConfigError
from megatron_moellava.data.pooling import Pools
from megatron_moellava.data.sample import IMAGE_PLACEHOLDER, ImageRef, Sample
from megatron_moellava.data.templates import CONTROL, TEMPLATES, Piece, Template, render, turns_of
from megatron_moellava.data.tokenizer import Tokenizer

IMAGE_TOKEN = -200  # placeholder that image features overwrite (the original's IMAGE_TOKEN_INDEX)
IGNORE_INDEX = -100  # label of a position without loss


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncodedSample:
    """A sample as token ids and shifted labels, without its pixels."""

    id: str
    tag: str
    tokens_S: np.ndarray  # int64; each image is its number of IMAGE_TOKEN
    labels_S: np.ndarray  # int64, shifted; IGNORE_INDEX = no loss
    images: tuple[ImageRef, ...] = ()
    features: tuple[int, ...] = ()  # tokens of each image
    grids: tuple[tuple[int, ...], ...] = ()  # how each image's tokens lie (`Plan.grid`), of towers that have that
    pools: Pools = ()  # how many of its images become one set of visual tokens, and which neighbours one token
    notes: tuple[str, ...] = ()  # what was done to the sample, for the counters
    length: int = 0  # before the cut

    def __len__(self) -> int:
        return len(self.tokens_S)


def check_template(template: Template, tokenizer: Tokenizer) -> None:
    """Every control token that the template writes must be one of the tokenizer's.

    Otherwise roles would be spelt in ordinary tokens that the model has never seen as marks, and an answer would never end.
    Raises ConfigError, which names the missing ones.
    """
    missing = [token for token in template.control_tokens if tokenizer.token_id(token) is None]
    if not missing:
        return
    fitting = dict.fromkeys(
        name
        for name, other in TEMPLATES.items()
        if all(tokenizer.token_id(token) is not None for token in other.control_tokens)
    )
    raise ConfigError(
        f"data.template={template.version!r} writes {', '.join(missing)}, which the tokenizer does not have; use the "
        f"template that belongs to this tokenizer's language model (this tokenizer has all of {', '.join(fitting)})"
    )


def answer_ends(template: Template, tokenizer: Tokenizer) -> tuple[frozenset[int], tuple[str, ...]]:
    """(tokens, texts) at which generation stops: the end that training put after an answer, and the tokenizer's own.

    >>> ChatML's end is "<|im_end|>" and a line break: the token stops. The end of `v0` is "###", that of `plain` a line
    break: these are found in the text, since no one knows which tokens spell them there.
    """
    token = CONTROL.search(template.end)
    end = tokenizer.token_id(token.group()) if token else None
    texts = (template.end.strip() or template.end,) if end is None else ()
    return frozenset({tokenizer.eos_id} | ({end} if end is not None else set())), texts


def encode(sample: Sample, template: Template, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(ids, labels), aligned, one IMAGE_TOKEN per image.

    >>> "USER: hi ASSISTANT: yes</s>" -> labels are IGNORE_INDEX up to the colon, then the ids of " yes" and "</s>"
    """
    builder = _Builder(tokenizer, images=bool(sample.images))
    builder.add_ids(tokenizer.bos_ids, trained=False)
    for piece in render(template, turns_of(template, sample)):
        builder.add(piece)
    builder.flush()
    return builder.ids, builder.labels


@dataclass(kw_only=True, slots=True)
class _Span:
    start: int  # character in the pending text
    trained: bool
    head: int  # leading tokens trained although the span is not


class _Builder:
    """Collects what lies between two images: that stretch is what the original hands to its tokenizer as one text."""

    def __init__(self, tokenizer: Tokenizer, *, images: bool):
        self.tokenizer, self.images = tokenizer, images
        self.ids: list[int] = []
        self.labels: list[int] = []
        self._parts: list[str | int] = [""]  # texts and control tokens in turn
        self._spans: list[list[_Span]] = [[]]  # of each part

    def add(self, piece: Piece) -> None:
        for index, part in enumerate(CONTROL.split(piece.text) if piece.literal else [piece.text]):
            token = self.tokenizer.token_id(part) if index % 2 else None
            if token is None:
                self._add_text(part, piece.trained, piece.head)
                continue
            self._parts += [token, ""]
            self._spans += [[_Span(start=0, trained=piece.trained, head=0)], []]

    def _add_text(self, text: str, trained: bool, head: int) -> None:
        for index, part in enumerate(text.split(IMAGE_PLACEHOLDER) if self.images else [text]):
            if index:
                self.flush()
                self.add_ids([IMAGE_TOKEN], trained=False)
            if part:
                before = str(self._parts[-1])
                self._spans[-1].append(_Span(start=len(before), trained=trained, head=head))
                self._parts[-1] = before + part

    def flush(self) -> None:
        pieces = self.tokenizer.encode_parts(self._parts)
        for part, spans, (ids, starts) in zip(self._parts, self._spans, pieces, strict=True):
            length = len(part) if isinstance(part, str) else 1
            ends, current = [*spans, _Span(start=length + 1, trained=False, head=0)], -1
            for token, start in zip(ids, starts, strict=True):
                while start >= ends[current + 1].start:
                    current += 1
                span = ends[max(current, 0)]
                self.add_ids([token], trained=span.trained or span.head > 0)
                span.head -= 1
        self._parts, self._spans = [""], [[]]

    def add_ids(self, ids: list[int], *, trained: bool) -> None:
        self.ids += ids
        self.labels += ids if trained else [IGNORE_INDEX] * len(ids)


def expand(
    ids: list[int],
    labels: list[int],
    images: tuple,
    features: tuple[int, ...],
    seq_length: int,
    text_length: int | None = None,
):
    """(tokens_S, shifted labels_S, images kept, length before the cut).

    A row longer than seq_length is cut there; an image that would be cut goes as a whole, with all that follows it.
    `text_length` cuts before images grow: so many ids, of which an image is one.
    """
    widths = iter(features)
    counts = np.array([next(widths) if token == IMAGE_TOKEN else 1 for token in ids], dtype=np.int64)
    ends = np.cumsum(counts)
    length = int(ends[-1]) if len(ends) else 0
    kept = int(np.searchsorted(ends[:text_length], seq_length, side="right"))
    tokens_S = np.repeat(np.array(ids[:kept], dtype=np.int64), counts[:kept])
    labels_S = np.repeat(np.array(labels[:kept], dtype=np.int64), counts[:kept])
    shifted_S = np.append(labels_S[1:], IGNORE_INDEX) if len(labels_S) else labels_S
    return tokens_S, shifted_S, images[: ids[:kept].count(IMAGE_TOKEN)], length
