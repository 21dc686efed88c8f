"""A byte tokenizer of a given size, with every control token that a template ends answers with."""

import json
from pathlib import Path

CONTROL = ("<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end_of_turn|>")
LLAMA_3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def write_tokenizer(folder: Path, *, size: int = 512, control: tuple[str, ...] = (*CONTROL, *LLAMA_3)) -> Path:
    """Writes tokenizer.json with ids 0 to size - 1; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {f"word{number}": number for number in range(size - len(control))}
    added = [
        {"id": len(words) + number, "content": token, "special": True, "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False}
        for number, token in enumerate(control)
    ]
    content = {"version": "1.0", "added_tokens": added, "model": {"type": "BPE", "vocab": words, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": control[0]} if control else {}))
    return folder
