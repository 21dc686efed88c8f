"""StableLM-2's tokenizer (Arcade100k) from its `arcade100k.tiktoken`, without the code that its folder brings along.

Source: https://huggingface.co/stabilityai/stablelm-2-1_6b, tokenization_arcade100k.py (split pattern, NFC, special
tokens), in the version that MoE-LLaVA carries.
"""

from pathlib import Path

from megatron_moellava.data.tiktoken_ranks import ranks_tokenizer

RANKS = "arcade100k.tiktoken"
FIRST_SPECIAL = 100257  # the file has 100,256 ranks; id 100256 is nobody's
_CODE = (
    "gh_stars filename issue_start issue_comment issue_closed jupyter_start jupyter_text jupyter_code jupyter_output "
    "empty_output commit_before commit_msg commit_after reponame"
)
_NAMES = (
    "<|endoftext|>",
    *(f"<|fim_{part}|>" for part in ("prefix", "middle", "suffix", "pad")),
    *(f"<{name}>" for name in _CODE.split()),
    *("<|endofprompt|>", "<|im_start|>", "<|im_end|>", "<|pause|>"),
    *(f"<|reg{number}|>" for number in range(8)),
    "<|extra0|>",
)
SPECIALS = {token: FIRST_SPECIAL + number for number, token in enumerate(_NAMES)}


def stablelm_tokenizer(folder: Path):
    """transformers' fast tokenizer with the same ids as StableLM's own, and `<|endoftext|>` as end of an answer."""
    return ranks_tokenizer(folder / RANKS, SPECIALS, _NAMES[0])
