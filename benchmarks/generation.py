"""Tokens per second beside transformers' generate: the same weights, the same prompts, the same answers, in one run.

  python -m benchmarks.generation [--new-tokens 64] [--rounds 5] [--batch 8]      the models of PLAN
  python -m benchmarks.generation --hidden 512 --layers 8 --experts 4 [--dense] [--precision bf16]

A random LLaVA with Qwen2-MoE experts in every other layer (or dense) is written by transformers, imported, and asked by
both. "equal": prompts and answers of one length, the best case of a static batch. "mixed": four batches' worth of
requests whose answers end after 1/8 to 8/8 of the tokens; transformers takes them batch by batch and waits for the
longest of each. Rounds alternate; medians count. The share of answers that agree token by token is
in the result (all of them in fp32). Random weights leave the best two tokens close together, so in bf16 the answers part
sooner or later; "bf16 error" tells whether either side is less exact than the other.
"""

import argparse
import copy
import random
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.measure import finish, median, ratio, say, take_turns
from benchmarks.reference import Sizes, write_reference
from megatron_moellava import parallel, platform
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import DataConfig, ParallelConfig
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import Pieces, Tokenizer
from megatron_moellava.inference.engine import Engine
from megatron_moellava.inference.load import inference_layout, inference_run
from megatron_moellava.inference.prompts import Prompt, Prompter
from megatron_moellava.inference.requests import Request, Sampling
from megatron_moellava.model.build import build_model
from megatron_moellava.model.weights import load_weights

VOCABULARY = 32000


class Numbers(Tokenizer):
    """Tokens are their numbers: prompts are given as ids, and no answer ends by itself."""

    bos_id, eos_id, pad_id, vocab_size = None, -1, 0, VOCABULARY

    def token_id(self, token: str) -> int | None:
        return None

    def encode_parsed(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def encode_parts(self, parts: Sequence[str | int]) -> list[Pieces]:
        numbers = [str(part) for part in parts]
        return [(self.encode_parsed(text), [match.start() for match in re.finditer(r"\S+", text)]) for text in numbers]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def piece(self, index: int) -> bytes:
        return f" {index}".encode()

    def is_control(self, index: int) -> bool:
        return False


@dataclass(frozen=True)
class Job:
    prompt: Prompt
    new_tokens: int


def open_engine(folder: Path, batch: int, precision: str) -> Engine:
    import_checkpoint(folder, save=folder / "megatron", dtype="float32", seed=1)
    checkpoint = require_checkpoint(folder / "megatron")
    layout = inference_layout(ParallelConfig())
    parallel.initialize(layout, 1)
    run = inference_run(checkpoint, layout, tokenizer=str(folder), template="v0", precision=precision)
    (model,) = build_model(run)
    load_weights(checkpoint, [model])
    prompter = Prompter(template=get_template("v0"), tokenizer=Numbers(), tower=model.tower, data=DataConfig())
    return Engine(model, prompter, max_batch_size=batch, max_sequence_length=1024)


def make_jobs(engine: Engine, args: argparse.Namespace, mixed: bool) -> list[Job]:
    source, features = random.Random(3), engine.model.tower.num_features
    size = engine.model.tower.image_size
    jobs = []
    for number in range(args.batch * (4 if mixed else 1)):
        words = [source.randrange(3, VOCABULARY - 1) for _ in range(24)]
        pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(number))
        prompt = Prompt(tokens=words[:4] + [IMAGE_TOKEN] * features + words[4:], pixels_NCHW=pixels, tiles=(1,))
        share = (number * 5 % 8 + 1) / 8 if mixed else 1.0
        jobs.append(Job(prompt, max(1, round(args.new_tokens * share))))
    return jobs


def ask_engine(engine: Engine, jobs: list[Job]) -> list[list[int]]:
    engine.forward.features.clear()
    for number, job in enumerate(jobs):
        request = Request(id=str(number), turns=(), sampling=Sampling(max_new_tokens=job.new_tokens))
        engine.submit(request, job.prompt)
    answers: dict[str, list[int]] = {}
    while engine.busy:
        answers |= {e.request_id: list(e.completion.tokens) for e in engine.step() if e.completion is not None}
    return [answers[str(number)] for number in range(len(jobs))]


@torch.no_grad()
def ask_transformers(model, jobs: list[Job], batch: int) -> list[list[int]]:
    answers = []
    for start in range(0, len(jobs), batch):
        part = jobs[start : start + batch]
        ids = torch.tensor([[VOCABULARY - 1 if t == IMAGE_TOKEN else t for t in job.prompt.tokens] for job in part])
        pixels = torch.cat([job.prompt.pixels_NCHW for job in part])
        longest = max(job.new_tokens for job in part)
        ids, pixels = ids.to(model.device), pixels.to(model.device, model.dtype)
        out = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=longest, do_sample=False)
        answers += [row[: job.new_tokens].tolist() for row, job in zip(out[:, ids.shape[1] :], part, strict=True)]
    return answers


def compare(name: str, engine: Engine, model, jobs: list[Job], args: argparse.Namespace) -> dict:
    said: dict[str, list[list[int]]] = {}
    ways = {
        "ours": lambda: said.update(ours=ask_engine(engine, jobs)),
        "transformers": lambda: said.update(transformers=ask_transformers(model, jobs, args.batch)),
    }
    seconds = take_turns(ways, args.rounds)
    tokens = sum(job.new_tokens for job in jobs)
    equal = sum(ours == theirs for ours, theirs in zip(said["ours"], said["transformers"], strict=True))
    result = {
        "tokens per second": {way: tokens / median(values) for way, values in seconds.items()},
        "ratio": ratio(seconds["transformers"], seconds["ours"]),
        "identical answers": equal / len(jobs),
    }
    say(f"{name:8} {result}")
    return result


@torch.no_grad()
def bf16_errors(engine: Engine, model, jobs: list[Job]) -> dict[str, float]:
    """Median relative difference of the prompts' logits from those of `model`, which is in fp32."""
    tokens_BS = torch.tensor([job.prompt.tokens for job in jobs])
    pixels = torch.cat([job.prompt.pixels_NCHW for job in jobs])
    tokens_BS, pixels = tokens_BS.to(model.device), pixels.to(model.device)
    positions_BS = torch.arange(tokens_BS.shape[1], device=model.device).repeat(len(jobs), 1)
    ids_BS = tokens_BS.masked_fill(tokens_BS == IMAGE_TOKEN, VOCABULARY - 1)
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    expected_BSV = model(input_ids=ids_BS, pixel_values=pixels).logits
    logits = {
        "ours": engine.model(tokens_BS, positions_BS, pixels_NCHW=pixels.bfloat16())[..., :VOCABULARY],
        "transformers": rounded(input_ids=ids_BS, pixel_values=pixels.bfloat16()).logits,
    }
    return {
        way: float(((item.float() - expected_BSV).norm(dim=-1) / expected_BSV.norm(dim=-1)).median())
        for way, item in logits.items()
    }


def linearity(engine: Engine, jobs: list[Job], new_tokens: int, rounds: int) -> float:
    """Seconds per token of the second half over the first: 1.0 is linear."""
    ways = {
        str(length): lambda length=length: ask_engine(engine, [replace(job, new_tokens=length) for job in jobs])
        for length in (1, new_tokens, 2 * new_tokens)
    }
    one, first, second = (median(values) for values in take_turns(ways, rounds).values())
    return (second - first) / (first - one)


def measure(sizes: Sizes, precision: str, args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        model = write_reference(Path(folder), sizes).to(platform.device())
        engine = open_engine(Path(folder), args.batch, precision)
        parameters = sum(parameter.numel() for parameter in engine.model.parameters())
        say(f"{parameters / 1e6:.0f} M parameters, {sizes.experts} experts, {precision}")
        equal = make_jobs(engine, args, mixed=False)
        errors = {}
        if precision == "bf16":
            errors = {"bf16 error": bf16_errors(engine, model, equal)}
            model = model.to(torch.bfloat16)
        result = {
            "parameters": parameters,
            "experts": sizes.experts,
            "precision": precision,
            "equal": compare("equal", engine, model, equal, args),
            "mixed": compare("mixed", engine, model, make_jobs(engine, args, mixed=True), args),
            "second half over first": linearity(engine, equal, args.new_tokens, args.rounds),
            **errors,
        }
    parallel.shutdown()
    return result


PLAN = (
    (Sizes(), "fp32"),
    (Sizes(), "bf16"),
    (Sizes(hidden=128, layers=4, ffn=352), "fp32"),
    (Sizes(hidden=128, layers=4, ffn=352), "bf16"),
    (Sizes(hidden=128, layers=4, ffn=352, experts=0), "fp32"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, help="one model of this size instead of PLAN")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: rounding may part answers")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    plan = PLAN
    if args.hidden:
        experts = 0 if args.dense else args.experts
        sizes = Sizes(hidden=args.hidden, layers=args.layers, experts=experts, ffn=int(args.hidden * 2.75))
        plan = ((sizes, args.precision),)
    rows = [measure(sizes, precision, args) for sizes, precision in plan]
    finish({"batch": args.batch, "new tokens": args.new_tokens, "rows": rows})


if __name__ == "__main__":
    main()
