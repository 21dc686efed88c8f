"""llama.cpp's server answers a question with and without a picture, with each folder of a list; in its own environment.

python ask.py QUESTIONS.json ANSWERS.json
"""

import base64
import json
import sys
import traceback
import urllib.request
from pathlib import Path

import xllamacpp


def main(questions: str, answers: str) -> None:
    """QUESTIONS: {picture, question, new_tokens, models: {name: {folder, known, rows}}}."""
    asked = json.loads(Path(questions).read_text())
    found = {}
    for name, model in asked["models"].items():
        try:
            found[name] = ask(asked, **model)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        Path(answers).write_text(json.dumps(found))


def ask(asked: dict, folder: str, known: int, rows: int) -> dict:
    """{"picture", "text"}: ids of the prompt, of the answer, and its log-probabilities. `known` to `rows` are not said."""
    server = xllamacpp.Server(settings(folder))
    data = base64.b64encode(Path(asked["picture"]).read_bytes()).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    contents = {"picture": [picture, {"type": "text", "text": asked["question"]}], "text": asked["question"]}
    found = {}
    for name, content in contents.items():
        messages = [{"role": "user", "content": content}]
        text = post(server, "/apply-template", {"messages": messages})["prompt"]
        ids = post(server, "/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        options = {"temperature": 0, "max_tokens": asked["new_tokens"], "logprobs": True, "top_logprobs": 1}
        unsaid = [[index, False] for index in range(known, rows)]
        reply = post(server, "/v1/chat/completions", {"messages": messages, "logit_bias": unsaid, **options})
        steps = reply["choices"][0]["logprobs"]["content"]
        found[name] = {"text": text, "prompt": ids, "prompt_tokens": reply["usage"]["prompt_tokens"]}
        found[name] |= {"tokens": [step["id"] for step in steps], "logprobs": [step["logprob"] for step in steps]}
    return found


def settings(folder: str) -> xllamacpp.CommonParams:
    params = xllamacpp.CommonParams()
    params.model.path = f"{folder}/model.gguf"
    params.mmproj.path = f"{folder}/mmproj.gguf"
    params.n_ctx, params.n_parallel, params.warmup, params.use_jinja = 512, 1, False, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return params


def post(server: xllamacpp.Server, path: str, body: dict) -> dict:
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


if __name__ == "__main__":
    main(*sys.argv[1:])
