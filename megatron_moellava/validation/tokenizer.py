"""The tokenizer, as far as it can be known without transformers, whose import takes seconds: that its folder holds one,
that no code of the folder is needed, and that it has the tokens which the template writes and no more than the language
model has embeddings for. `data/tokenizer.py` loads the tokenizer itself, and a run asks both questions again of that.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_moellava.backbones import Backbone
from megatron_moellava.config import ConfigError, MoELlavaError, RunConfig
from megatron_moellava.data import llama_tokenizer, qwen_tokenizer, stablelm_tokenizer
from megatron_moellava.data.encode import check_template
from megatron_moellava.data.templates import Template
from megatron_moellava.data.tokenizer import ADVICE, INVENTED, UNKNOWN_TOKENS
from megatron_moellava.data.tokenizer_files import read_files, read_object


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """What the checks below ask of a tokenizer."""

    added: dict[str, int]  # control and added tokens
    vocab_size: int  # ids are below this

    def token_id(self, token: str) -> int | None:
        """The id of a control or added token; None for any other text."""
        return self.added.get(token)


def tokenizer_problems(run: RunConfig, backbone: Backbone | None, template: Template | None) -> Iterator[str]:
    """Of `data.tokenizer`, together with the template and the backbone that it is used with."""
    name = run.data.tokenizer
    path = Path(name).expanduser()
    if not name:
        yield "data.tokenizer is empty; pass data.tokenizer=FOLDER with the backbone's tokenizer, or a SentencePiece .model"
        return
    if not path.exists():
        yield f"data.tokenizer={name} does not exist; it is a tokenizer folder or a SentencePiece .model"
        return
    try:
        found = read_tokenizer(path)
    except MoELlavaError as error:
        yield str(error)
        return
    if backbone is not None and found.vocab_size > backbone.vocab_size:
        yield too_large(name, found.vocab_size, backbone)
    if template is not None:
        try:
            check_template(template, found)
        except MoELlavaError as error:
            yield str(error)


def too_large(name: str, size: int, backbone: Backbone) -> str:
    """The message for a tokenizer with tokens that the model has no embedding for."""
    return (
        f"data.tokenizer={name} has {size} tokens, more than the vocab_size={backbone.vocab_size} of {backbone.name}; "
        "use the tokenizer of this backbone"
    )


def read_tokenizer(path: Path):
    """Something with `token_id` and `vocab_size` for a folder or a .model file. ConfigError where there is no tokenizer."""
    if not path.is_dir() and path.suffix != ".model":
        raise ConfigError(f"data.tokenizer={path} is neither a folder nor a SentencePiece .model file; give one")
    try:
        found = llama_tokenizer.open_tokenizer(path) or _vocabulary(path)
    except ConfigError:
        raise
    except Exception as error:  # sentencepiece and tokenizers raise whatever they like, Exception included
        raise ConfigError(f"data.tokenizer={path} cannot be read ({type(error).__name__}: {error}); {ADVICE}") from None
    if found is None:
        held = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "nothing"
        needs_code = "auto_map" in read_object(path / "tokenizer_config.json")
        why = "can only be read by running the code that comes with it" if needs_code else "holds no tokenizer"
        raise ConfigError(f"data.tokenizer={path} {why} (it holds {held}); {ADVICE}")
    return found


def _vocabulary(folder: Path) -> Vocabulary | None:
    """The kinds of `data/byte_tokenizer.py`."""
    if (folder / "tokenizer.json").exists():
        return _from_json(folder)
    for kind in (qwen_tokenizer, stablelm_tokenizer):
        if (folder / kind.RANKS).exists():
            return _from_ranks(folder / kind.RANKS, kind.SPECIALS)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        words, added = read_object(folder / "vocab.json"), _beside(folder)
        files = read_files(folder)
        extra = {token: words[token] for token in files.additional if token in words}
        return _as_loaded(words, extra | added, DEFAULT_NAMES | files.named)
    return None


DEFAULT_NAMES = dict.fromkeys(("eos_token", "unk_token"), "<|endoftext|>")  # of the classes that have such files


def _as_loaded(words: dict[str, int], added: dict[str, int], named: dict[str, str]) -> Vocabulary:
    """With the tokens that loading appends: those that are named and in no vocabulary, and one for padding."""
    known, added = words | added, dict(added)
    for token in dict.fromkeys(named.values()):
        known.setdefault(token, max(known.values()) + 1)
        added[token] = known[token]  # what has a name is a control token
    if not added.keys() & {*UNKNOWN_TOKENS}:
        known.setdefault(INVENTED, max(known.values()) + 1)
        added[INVENTED] = known[INVENTED]
    return Vocabulary(added=added, vocab_size=max(known.values()) + 1)


def _from_json(folder: Path) -> Vocabulary:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(folder / "tokenizer.json"))
    added = {token.content: number for number, token in backend.get_added_tokens_decoder().items()} | _beside(folder)
    return _as_loaded(backend.get_vocab(), added, read_files(folder).named)


def _from_ranks(file: Path, specials: tuple[str, ...] | dict[str, int]) -> Vocabulary:
    """tiktoken's format: base64 of each token, and its rank. Special tokens follow, or have ids of their own."""
    with file.open() as lines:
        last = max(int(line.split()[1]) for line in lines if line.strip())
    added = specials if isinstance(specials, dict) else {token: last + 1 + i for i, token in enumerate(specials)}
    return Vocabulary(added=added, vocab_size=max(last, *added.values()) + 1)


def _beside(folder: Path) -> dict[str, int]:
    """Tokens that the small files beside a vocabulary add to it."""
    return {token.content: token.id for token in read_files(folder).added if token.id is not None}
