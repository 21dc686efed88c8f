"""llama.cpp answers one question about one picture, and one without, with each folder of a list; in an environment of its own.

python ask.py QUESTIONS.json ANSWERS.json
"""

import json
import math
import sys
import traceback
from pathlib import Path

from llama_cpp_py_sync import Llama
from llama_cpp_py_sync.multimodal import MultimodalContext


def main(questions: str, answers: str) -> None:
    """QUESTIONS: {picture, image_token, new_tokens, models: {name: {folder, known, texts}}}; texts are rendered chats."""
    asked = json.loads(Path(questions).read_text())
    found = {}
    for name, model in asked["models"].items():
        try:
            found[name] = ask(asked, **model)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        Path(answers).write_text(json.dumps(found))


def ask(asked: dict, folder: str, known: int, texts: dict[str, str]) -> dict:
    """{"picture", "text"}: ids of the prompt's texts and of the answer, and the answer's log-probabilities."""
    model = Llama(f"{folder}/model.gguf", n_ctx=512, n_threads=1, flash_attn_type=0, type_k="f32", type_v="f32")
    sight = MultimodalContext(
        model, f"{folder}/mmproj.gguf", use_gpu=False, n_threads=1, flash_attn_type=0, warmup=False
    )
    picture = ("image/png", Path(asked["picture"]).read_bytes())
    found = {}
    for name, text in texts.items():
        model._clear_context_state()
        pictures = [picture] if name == "picture" else []
        with sight.tokenize_prompt(text.replace(asked["image"], sight.marker), pictures, add_special=False) as prompt:
            ids = [
                token
                for chunk in prompt
                for token in (chunk.text_tokens if chunk.type == "text" else ["image"] * chunk.n_tokens)
            ]
            past = sight.evaluate_prompt(prompt)
        found[name] = {"prompt": ids} | answer(model, past, known, asked["new_tokens"])
    sight.close()
    model.close()
    return found


def answer(model: Llama, past: int, known: int, new_tokens: int) -> dict:
    """Greedily, among the first `known` ids."""
    tokens, logprobs = [], []
    for _ in range(new_tokens):
        raw = model._lib.llama_get_logits_ith(model._ctx, -1)
        logits = [raw[index] for index in range(model.n_vocab)]
        best = max(range(known), key=logits.__getitem__)
        top = max(logits)
        logprobs.append(logits[best] - top - math.log(sum(math.exp(value - top) for value in logits)))
        tokens.append(best)
        past = model._eval_tokens([best], past)
    return {"tokens": tokens, "logprobs": logprobs}


if __name__ == "__main__":
    main(*sys.argv[1:])
