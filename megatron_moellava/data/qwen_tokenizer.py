"""Qwen (v1)'s tokenizer from its `qwen.tiktoken`, without the Python code that its folder brings along.

Source: https://huggingface.co/Qwen/Qwen-1_8B/blob/main/tokenization_qwen.py (split pattern, NFC, special tokens).
"""

from pathlib import Path

from megatron_moellava.data.tiktoken_ranks import SPLIT, ranks_tokenizer

__all__ = ["RANKS", "SPECIALS", "SPLIT", "qwen_tokenizer"]

RANKS = "qwen.tiktoken"
# In the order of their ids, which follow the ranks: 151643 to 151850.
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))


def qwen_tokenizer(folder: Path):
    """transformers' fast tokenizer with the same ids as Qwen's own, and `<|endoftext|>` as end of an answer."""
    return ranks_tokenizer(folder / RANKS, SPECIALS, SPECIALS[0])
