"""Tokens per second beside transformers' generate: the same weights, the same prompts, the same answers, in one run.

  python benchmarks/generation.py [--hidden 512] [--layers 8] [--experts 4] [--batch 8] [--new-tokens 64] [--dense]

A random LLaVA with Qwen2-MoE experts in every other layer (or dense) is written by transformers, imported, and asked by
both. "equal": prompts and answers of one length, the best case of a static batch. "mixed": four batches' worth of
requests whose answers end after 1/8 to 8/8 of the tokens; transformers takes them batch by batch and waits for the
longest of each. Rounds alternate; the best of each counts. The answers must agree token by token.
"""

import argparse
import random
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_moellava import parallel, platform
from megatron_moellava.config import DataConfig, ParallelConfig
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import Tokenizer
from megatron_moellava.inference.engine import Engine
from megatron_moellava.inference.load import inference_layout, inference_run
from megatron_moellava.inference.prompts import Prompt, Prompter
from megatron_moellava.inference.requests import Request, Sampling
from megatron_moellava.model.build import build_model
from megatron_moellava.model.checkpoint import load_weights, require_checkpoint

VOCABULARY = 32000
IMAGE_ID = VOCABULARY - 1


class Numbers(Tokenizer):
    """Tokens are their numbers: prompts are given as ids, and no answer ends by itself."""

    bos_id, eos_id, pad_id, vocab_size = None, -1, 0, VOCABULARY

    def token_id(self, token: str) -> int | None:
        return None

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@dataclass(frozen=True)
class Job:
    prompt: Prompt
    new_tokens: int


def write_reference(folder: Path, args: argparse.Namespace):
    """transformers' model, random, and its folder."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, Qwen2MoeConfig

    sizes = {
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": args.hidden // 64,
        "intermediate_size": int(args.hidden * 2.75),
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    if args.dense:
        text = Qwen2Config(**sizes)
    else:
        text = Qwen2MoeConfig(
            **sizes,
            num_experts=args.experts,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            mlp_only_layers=list(range(1, args.layers, 2)),
            moe_intermediate_size=sizes["intermediate_size"],
            shared_expert_intermediate_size=0,
        )
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=84, patch_size=14
    )
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_ID)
    ).eval()
    with torch.no_grad():  # otherwise all logits are nearly the same, and rounding decides
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0 if "embed" in name or "lm_head" in name else 1.5)
    model.save_pretrained(folder)
    _drop_empty_shared_experts(folder / "model.safetensors")
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def _drop_empty_shared_experts(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: value for name, value in load_file(file).items() if "shared_expert" not in name}, file)


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
        ids = torch.tensor([[IMAGE_ID if t == IMAGE_TOKEN else t for t in job.prompt.tokens] for job in part])
        pixels = torch.cat([job.prompt.pixels_NCHW for job in part])
        longest = max(job.new_tokens for job in part)
        out = model.generate(
            input_ids=ids, pixel_values=pixels.to(model.dtype), max_new_tokens=longest, do_sample=False
        )
        answers += [row[: job.new_tokens].tolist() for row, job in zip(out[:, ids.shape[1] :], part, strict=True)]
    return answers


def compare(name: str, engine: Engine, model, jobs: list[Job], args: argparse.Namespace) -> None:
    ways = {
        "ours": lambda: ask_engine(engine, jobs),
        "transformers": lambda: ask_transformers(model, jobs, args.batch),
    }
    best, said = dict.fromkeys(ways, float("inf")), {}
    for _ in range(args.rounds):
        for way, ask in ways.items():
            started = time.perf_counter()
            said[way] = ask()
            best[way] = min(best[way], time.perf_counter() - started)
    tokens = sum(job.new_tokens for job in jobs)
    equal = sum(ours == theirs for ours, theirs in zip(*said.values(), strict=True))
    speeds = {way: tokens / seconds for way, seconds in best.items()}
    print(
        f"{name:8} ours {speeds['ours']:8.1f} tokens/s, transformers {speeds['transformers']:8.1f} tokens/s, "
        f"ratio {speeds['ours'] / speeds['transformers']:.2f}; {equal} of {len(jobs)} answers identical",
        flush=True,
    )


def linearity(engine: Engine, jobs: list[Job], new_tokens: int, rounds: int) -> None:
    """Seconds per token of the second half over the first: 1.0 is linear."""
    lengths = (1, new_tokens, 2 * new_tokens)
    best = dict.fromkeys(lengths, float("inf"))
    for _ in range(rounds):
        for length in lengths:
            started = time.perf_counter()
            ask_engine(engine, [replace(job, new_tokens=length) for job in jobs])
            best[length] = min(best[length], time.perf_counter() - started)
    first, second = best[new_tokens] - best[1], best[2 * new_tokens] - best[new_tokens]
    print(f"linear   {new_tokens} more tokens cost {second / first:.2f} times the first {new_tokens}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: rounding may part answers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_reference(Path(folder), args)
        engine = open_engine(Path(folder), args.batch, args.precision)
        model = model.to(torch.bfloat16) if args.precision == "bf16" else model
        size = sum(parameter.numel() for parameter in engine.model.parameters())
        print(
            f"{size / 1e6:.0f} M parameters, {args.precision}, {torch.get_num_threads()} threads, {platform.device()}",
            flush=True,
        )
        equal = make_jobs(engine, args, mixed=False)
        compare("equal", engine, model, equal, args)
        compare("mixed", engine, model, make_jobs(engine, args, mixed=True), args)
        linearity(engine, equal, args.new_tokens, args.rounds)
    parallel.shutdown()


if __name__ == "__main__":
    main()
