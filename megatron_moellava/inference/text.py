"""Tokens -> text as it becomes certain.

Two things hold text back: half a character at the end (a byte-level tokenizer may split one over several tokens), and
an end that may still become a stop string.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_moellava.data.tokenizer import Tokenizer

HALF = "\ufffd"  # what decoding shows for an incomplete character


@dataclass(slots=True)
class TextStream:
    """The text of one answer, token by token, up to a stop string."""

    tokenizer: Tokenizer
    stop: Sequence[str] = ()
    tokens: list[int] = field(default_factory=list)
    text: str = ""  # certain so far
    stopped: bool = False
    length: int = 0  # characters of all tokens so far, an unfinished character and what is held back included
    certain: int = 0  # of them, those that are certain or, after a stop string, those before it

    def add(self, token: int) -> str:
        """The text that one more token makes certain."""
        self.tokens.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """What was held back."""
        return "" if self.stopped else self._advance(final=True)

    def ends(self, tokens: list[int]) -> bool:
        """Whether the last of `tokens` completes a stop string."""
        if not self.stop:
            return False
        tail = self.tokenizer.decode(tokens[-max(map(len, self.stop)) - 8 :])
        return any(mark in tail for mark in self.stop)

    def _advance(self, final: bool) -> str:
        decoded = self.tokenizer.decode(self.tokens) if self.tokens else ""
        found = [position for mark in self.stop if (position := decoded.find(mark)) >= 0]
        # An answer may end at once, also with a line break: so the blanks before it go last.
        end = min(found, default=len(decoded))
        whole = possible = decoded[:end].lstrip()
        if found:
            self.stopped = True
        elif not final:
            whole = whole.rstrip(HALF)
            whole = whole[: len(whole) - max((_overlap(whole, mark) for mark in self.stop), default=0)]
        self.length, self.certain = len(decoded.rstrip(HALF)), end - (len(possible) - len(whole))
        new = whole[len(self.text) :]
        self.text += new
        return new


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`: ("a#", "###") -> 1."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)
