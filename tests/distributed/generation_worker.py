"""One rank of a generation under a layout: generation_worker.py CHECKPOINT OUT {"layout": {...}, "replicated": false}"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_moellava import parallel
from megatron_moellava.config import ParallelConfig
from megatron_moellava.data.sample import Turn
from megatron_moellava.inference.load import load_for_inference
from tests.helpers.inference_models import ask, mixed_requests


def requests_of_the_test():
    several = ask(8, "Several?", n=3, temperature=1.3, seed=5, logprobs=3, max_new_tokens=5)
    as_json = ask(9, "As JSON.", n=2, temperature=1.5, seed=2, json_schema=json.dumps({"enum": ["red", "green", 12]}))
    return [*mixed_requests(), ask(7, num_beams=3, max_new_tokens=5), several, as_json]


def next_turns(requests):
    """The same conversations with one more question: their beginnings have been read."""
    again = Turn(role="assistant", text="so"), Turn(role="user", text="Sure?")
    return [replace(request, id=f"next {request.id}", turns=(*request.turns, *again)) for request in requests]


def answers_of(engine, requests) -> dict:
    """Tokens of each answer, and what is known of their probabilities; of two turns."""
    return {
        f"{item.request_id} {item.index}": [
            list(item.tokens),
            [[one.logprob, *(value for _, value in one.top)] for one in item.logprobs],
        ]
        for turn in (requests, next_turns(requests))
        for item in engine.generate(turn)
    }


def main() -> None:
    checkpoint, out, job = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    engine = load_for_inference(
        checkpoint,
        layout=ParallelConfig(**job["layout"]),
        max_batch_size=4,
        replicated=job["replicated"],
        prefix_cache=0.01,
    )
    share = requests_of_the_test()
    if not job["replicated"]:
        share = share[parallel.data_parallel_rank() :: parallel.data_parallel_size()]
    answers = answers_of(engine, share)
    out.mkdir(exist_ok=True)
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps({"answers": answers, "cached": engine.cached_tokens}))
    dist.barrier()
    parallel.shutdown()


if __name__ == "__main__":
    main()
