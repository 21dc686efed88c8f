"""Answers that a JSON schema allows: llguidance says which tokens may come next.

Every rank follows an answer's tokens, so that all see its end; only the last stage asks what may follow. The grammar ends
an answer by itself: the template's own end is not needed, and may even stand inside a JSON string. What a hostile schema
costs is bounded: a grammar that grows beyond the limits is refused, or fails while it runs, and nobody else notices.
"""

import importlib.util
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_moellava.config import DataError
from megatron_moellava.data.tokenizer import Tokenizer

ANY_OBJECT = '{"type": "object"}'
# Symbols, regular expressions and states. A schema of 12,000 characters with 160 arrays takes a tenth of each; what
# reaches one costs 60 ms, where llguidance's own limits let 300 alternatives of 30 properties compute for half a minute.
LIMITS: dict[str, Any] = {
    "max_grammar_size": 20_000,
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "verbose_errors": False,
}
# Between two parts of a text: a blank, or a line break with its indentation. A model that is not sure of itself would
# otherwise fill its answer with blanks.
WHITESPACE = r" |\n[ \t]{0,32}"
REMEMBERED = 8  # compiled schemas; clients repeat theirs


@dataclass(slots=True)
class Grammar:
    """Where one answer stands in its grammar."""

    matcher: Any  # llguidance's

    def allowed(self, size: int) -> torch.Tensor:
        """Which of the first `size` tokens may come next: booleans [V]."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        allowed_V = np.unpackbits(bits, count=min(size, 8 * len(bits)), bitorder="little").astype(bool)
        return torch.from_numpy(np.pad(allowed_V, (0, size - len(allowed_V))))

    def advance(self, token: int) -> None:
        """Take the next token over."""
        self.matcher.consume_token(token)

    @property
    def failure(self) -> str:
        """Why the grammar cannot go on; "" while it can."""
        return _reason(self.matcher.get_error()) if self.matcher.is_error() else ""

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        return self.matcher.is_stopped() and not self.matcher.is_error()


class Grammars:
    """Compiles schemas for one tokenizer; the latest ones are remembered. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Iterable[int]):
        self.tokenizer, self.stop_ids = tokenizer, sorted(stop_ids)
        self._vocabulary: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, schema: str) -> Grammar:
        """The grammar of a new answer. `schema`: JSON text. Raises DataError for one that cannot be compiled."""
        with self._lock:
            if schema not in self._compiled:
                self._compiled[schema] = self._compile(schema)
            self._compiled.move_to_end(schema)
            while len(self._compiled) > REMEMBERED:
                self._compiled.popitem(last=False)
            return Grammar(self._compiled[schema].deep_copy())

    def _compile(self, schema: str) -> Any:
        if importlib.util.find_spec("llguidance") is None:
            raise DataError("JSON answers need llguidance where the model runs: pip install 'megatron-moellava[json]'")
        import llguidance

        if self._vocabulary is None:
            self._vocabulary = _vocabulary(self.tokenizer, self.stop_ids)
        content = {**json.loads(schema), "x-guidance": {"whitespace_pattern": WHITESPACE}}
        # A blank may come first, as in " {": text is shown without it, and many vocabularies begin every word with one.
        # Not forcing: else the only way to say what must come would be our tokenizer's, whose texts begin with blanks.
        text = f'%llguidance {{"no_forcing": true}}\nstart: " "? value\nvalue: %json {json.dumps(content)}'
        matcher = llguidance.LLMatcher(self._vocabulary, text, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))
        if matcher.is_error():
            raise DataError(f"the JSON schema cannot be served: {_reason(matcher.get_error())}")
        return matcher


def _vocabulary(tokenizer: Tokenizer, stop_ids: list[int]) -> Any:
    """llguidance's view of a tokenizer: the bytes of every token, and which ones are no text."""
    import llguidance

    ids = range(tokenizer.vocab_size)
    wrapped = llguidance.TokenizerWrapper(_Pieces(tokenizer, [tokenizer.piece(index) for index in ids]))
    return llguidance.LLTokenizer(wrapped, n_vocab=tokenizer.vocab_size, eos_token=stop_ids)


class _Pieces:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes]):
        self.tokenizer, self.tokens = tokenizer, tokens
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = [index for index in range(len(tokens)) if tokenizer.is_control(index)]

    def __call__(self, text: bytes) -> list[int]:
        return self.tokenizer.encode_text(text.decode("utf-8", "replace"))[0]


def _reason(error: str) -> str:
    """The line that says it, without the place in a grammar that the user has not written."""
    said = error.rpartition("error: ")[2] if "\nerror: " in error else error.rpartition("compile JSON schema: ")[2]
    return said.partition("\n")[0]
