"""A tokenizer from the ranks of a .tiktoken file, without the Python code that such a folder brings along."""

from pathlib import Path

from megatron_moellava.config import ConfigError

# Both Qwen (v1) and StableLM-2 split texts so: cl100k's pattern, but digits stand alone.
SPLIT = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""


def ranks_tokenizer(file: Path, specials: dict[str, int] | tuple[str, ...], eos_token: str):
    """transformers' fast tokenizer with the ids of tiktoken: NFC, SPLIT, then the ranks as merges.

    `specials`: token -> id, or names whose ids follow the ranks. The end of a text is `eos_token`.
    Raises ConfigError for a file without ranks, or with a special token's id.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    vocabulary, merges = TikTokenConverter().extract_vocab_merges_from_model(str(file))
    if not vocabulary:
        raise ConfigError(f"data.tokenizer: {file} holds no ranks; copy it again")
    if not isinstance(specials, dict):
        specials = {token: max(vocabulary.values()) + 1 + number for number, token in enumerate(specials)}
    if taken := set(specials.values()) & set(vocabulary.values()):
        raise ConfigError(f"data.tokenizer: {file} gives rank {min(taken)} to a word, which is a special token's id")
    # Special tokens stand in the vocabulary with their ids, which need not follow the ranks at once; no merge makes them.
    tokenizer = Tokenizer(models.BPE(vocabulary | specials, merges, fuse_unk=False, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos_token)
