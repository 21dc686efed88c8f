"""vLLM answers one question about one picture, and one without, with each folder of a list; runs in vLLM's own environment.

python ask.py QUESTIONS.json ANSWERS.json
"""

import base64
import gc
import json
import os
import sys
import traceback
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that one after the other gives its memory back
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # compiling what it samples with takes a C++ compiler minutes
}


def main(questions: str, answers: str) -> None:
    """QUESTIONS: {picture, question, new_tokens, models: {name: arguments of `ask`}}."""
    asked = json.loads(Path(questions).read_text())
    found = {}
    for name, model in asked["models"].items():
        try:
            found[name] = ask(asked, **model)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        Path(answers).write_text(json.dumps(found))


def ask(asked: dict, folder: str, known: int, kinds: list[str], options: dict) -> dict:
    """{kind: ids of the prompt and the answer, and the answer's log-probabilities}, all kinds in one batch.

    `known`: ids it may say; `options`: of LLM.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=folder,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=2,
        max_num_batched_tokens=512,
        num_gpu_blocks_override=64,
        enforce_eager=True,
        disable_log_stats=True,
        mm_processor_kwargs={"backend": "pil"},
        **options,
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=asked["new_tokens"], logprobs=0, allowed_token_ids=list(range(known))
    )
    data = base64.b64encode(Path(asked["picture"]).read_bytes()).decode()
    text = {"type": "text", "text": asked["question"]}
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    contents = {"picture": [picture, text], "text": asked["question"]}
    outputs = llm.chat([[{"role": "user", "content": contents[kind]}] for kind in kinds], sampling, use_tqdm=False)
    found = {}
    for kind, output in zip(kinds, outputs, strict=True):
        answer = output.outputs[0]
        logprobs = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        found[kind] = {"prompt": list(output.prompt_token_ids), "tokens": list(answer.token_ids), "logprobs": logprobs}
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
