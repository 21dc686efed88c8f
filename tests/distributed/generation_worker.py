"""One rank of a generation under a layout: generation_worker.py CHECKPOINT OUT {"layout": {...}, "replicated": false}"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_moellava import parallel
from megatron_moellava.config import ParallelConfig
from megatron_moellava.inference.load import load_for_inference
from tests.helpers.inference_models import ask, mixed_requests


def requests_of_the_test():
    several = ask(8, "Several?", n=3, temperature=1.3, seed=5, logprobs=3, max_new_tokens=5)
    return [*mixed_requests(), ask(7, num_beams=3, max_new_tokens=5), several]


def answers_of(engine, requests) -> dict:
    """Tokens of each answer, and what is known of their probabilities."""
    return {
        f"{item.request_id} {item.index}": [
            list(item.tokens),
            [[one.logprob, *(value for _, value in one.top)] for one in item.logprobs],
        ]
        for item in engine.generate(requests)
    }


def main() -> None:
    checkpoint, out, job = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    engine = load_for_inference(
        checkpoint, layout=ParallelConfig(**job["layout"]), max_batch_size=4, replicated=job["replicated"]
    )
    share = requests_of_the_test()
    if not job["replicated"]:
        share = share[parallel.data_parallel_rank() :: parallel.data_parallel_size()]
    answers = answers_of(engine, share)
    out.mkdir(exist_ok=True)
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(answers))
    dist.barrier()
    parallel.shutdown()


if __name__ == "__main__":
    main()
