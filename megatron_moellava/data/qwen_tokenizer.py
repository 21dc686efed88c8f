"""Qwen (v1)'s tokenizer from its `qwen.tiktoken`, without the Python code that its folder brings along.

Source: https://huggingface.co/Qwen/Qwen-1_8B/blob/main/tokenization_qwen.py (split pattern, NFC, special tokens).
"""

from pathlib import Path

RANKS = "qwen.tiktoken"
SPLIT = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
# In the order of their ids, which follow the ranks: 151643 to 151850.
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))


def qwen_tokenizer(folder: Path):
    """transformers' fast tokenizer with the same ids as Qwen's own, and `<|endoftext|>` as end of an answer."""
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(vocab_file=str(folder / RANKS), pattern=SPLIT, extra_special_tokens=list(SPECIALS))
    tokenizer = converter.converted()
    tokenizer.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIALS[0])
