"""Keys and values of conversations that have been answered: the next turn reads only what is new.

An entry is one row of the running requests' cache, kept when its answer ends, with the identity of each of its positions
(a word's id, or which part of which picture). A new prompt begins with the longest beginning that it shares with an
entry. Every rank keeps the same entries, each with its own layers and heads. Off (no bytes) unless asked for: a prompt in
two parts rounds differently from a whole one (1e-6 in fp32), and evaluation repeats to the last bit.

Shapes: S positions, G query groups, D channels of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.inference.prompts import Prompt
from megatron_moellava.inference.request_state import RequestState
from megatron_moellava.model.kv_cache import KVCache, Past

CONVERSATIONS = 128  # entries at most: each is compared with every new prompt, in microseconds


def identity(prompt: Prompt) -> np.ndarray:
    """What stands at each position [S]: a token's id, or below zero a number that only this part of this picture has."""
    ids_S = np.array(prompt.tokens, dtype=np.int64)
    visual = ids_S == IMAGE_TOKEN
    if visual.any():
        parts = [
            -(int.from_bytes(digest[:8]) >> 2) - 1 - np.arange(width)
            for digest, width in zip(prompt.digests, prompt.widths, strict=True)
        ]
        ids_S[visual] = np.concatenate(parts)
    return ids_S


@dataclass(slots=True, eq=False)
class Entry:
    """One row. `kind`: entries of different kinds embed the same words differently."""

    kind: bool
    ids_S: np.ndarray
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]]  # keys and values [G, S, D]


@dataclass(slots=True)
class PrefixCache:
    """The entries, the least recently used one first."""

    limit: float  # bytes on each rank; 0: nothing is kept
    bytes_per_position: int
    words_depend_on_images: bool = False  # words of a conversation with pictures are embedded differently
    entries: list[Entry] = field(default_factory=list)

    def past(self, answers: Sequence[RequestState]) -> Past | None:
        """What earlier requests have read of this one's prompt. Routing is recorded for whole prompts."""
        prompt = answers[0].prompt
        if answers[0].record or not self.entries:
            return None
        past = self.find(identity(prompt), self._kind(prompt))
        for running in answers:
            running.num_cached = past.length if past else 0
        return past

    def remember(self, running: RequestState, cache: KVCache) -> None:
        """What is known of a conversation stays for its next turn. Of several answers to one prompt the first is kept."""
        if not self.limit or running.index or running.beams is not None:
            return
        row, prompt = running.rows[0], running.prompt
        said = running.stream.tokens[: cache.lengths_R[row] - len(prompt.tokens)]  # the last one has not been read
        ids_S = np.concatenate([identity(prompt), np.array(said, dtype=np.int64)])
        self.keep(Entry(self._kind(prompt), ids_S, cache.row(row)))

    def _kind(self, prompt: Prompt) -> bool:
        return bool(prompt.tiles) and self.words_depend_on_images

    def find(self, ids_S: np.ndarray, kind: bool) -> Past | None:
        """The longest known beginning of a prompt, at least its last token excepted, whose logits are wanted; None: unknown."""
        lengths = [common(entry.ids_S, ids_S[:-1]) if entry.kind == kind else 0 for entry in self.entries]
        if not any(lengths):
            return None
        length = max(lengths)
        entry = self.entries.pop(lengths.index(length))
        self.entries.append(entry)
        return Past(length=length, layers=entry.layers)

    def keep(self, entry: Entry) -> None:
        """Add an entry that is not a known beginning; those that are its beginnings go, and then the oldest, until all fit.

        One that does not fit alone is not kept: it would drive all others out.
        """
        shared = [common(other.ids_S, entry.ids_S) if other.kind == entry.kind else -1 for other in self.entries]
        if len(entry.ids_S) in shared or len(entry.ids_S) * self.bytes_per_position > self.limit:
            return
        pairs = zip(self.entries, shared, strict=True)
        self.entries = [other for other, length in pairs if length < len(other.ids_S)] + [entry]
        while self.bytes > self.limit or len(self.entries) > CONVERSATIONS:
            self.entries.pop(0)

    @property
    def bytes(self) -> int:
        """Memory that the entries take."""
        return sum(len(entry.ids_S) for entry in self.entries) * self.bytes_per_position


def common(first_S: np.ndarray, second_S: np.ndarray) -> int:
    """Length of the beginning that both share."""
    size = min(len(first_S), len(second_S))
    different = first_S[:size] != second_S[:size]
    return int(different.argmax()) if different.any() else size
