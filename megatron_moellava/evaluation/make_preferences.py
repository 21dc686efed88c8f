"""What moellava make-preferences calls: a checkpoint answers its training rows several times, and its answers become pairs."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from megatron_moellava import parallel
from megatron_moellava.config import DataError
from megatron_moellava.data import media
from megatron_moellava.data.rows import read_rows
from megatron_moellava.evaluation.command import judge_of
from megatron_moellava.evaluation.generation import completions
from megatron_moellava.evaluation.preference_pairs import Asked, pair_of, polls, questions_of, scorer_of
from megatron_moellava.inference.engine import Engine
from megatron_moellava.inference.load import engine_of
from megatron_moellava.inference.requests import Request, Sampling

SEEDS = 1_000_003  # apart: seeds of the answers to one question follow each other


def make_preferences(args: argparse.Namespace) -> str:
    """Write --save, and return a line about it on the leading process; the others return an empty text.

    DataError for rows that cannot be read, or where no question gives a pair.
    """
    scorer = scorer_of(args.scorer, judge_of(args))
    read = polls if args.scorer == "poll" else questions_of
    questions = read(read_rows(args.data), args.data.name, args.limit)
    if not questions:
        raise DataError(
            f"{args.data} holds no question for --scorer {args.scorer}: rows need answers (poll: yes or no)"
        )
    folder = str(args.image_folder or args.data.parent)
    for asked in questions:
        for ref in asked.images:
            found = media.source(ref, folder, asked.id)
            if isinstance(found, str) and not Path(found).exists():
                raise DataError(
                    f"{args.data}: picture {ref.name} is not in {folder}; name its folder with --image-folder"
                )
    engine = engine_of(args, max_batch_size=args.batch_size)
    try:
        said = answers(engine, questions, folder, args)
        if dist.get_rank():
            return ""
        made = [pair_of(asked, texts, scorer, args.with_truth) for asked, texts in zip(questions, said, strict=True)]
    finally:
        parallel.shutdown()
    unclear = sum(count for _, count in made)
    return _write(args, [pair for pair, _ in made if pair is not None], len(questions), unclear)


def answers(engine: Engine, questions: list[Asked], folder: str, args: argparse.Namespace) -> list[list[str]]:
    """`args.samples` answers to each question, in order, on every rank: the same under any layout. Collective."""
    rank, size = parallel.data_parallel_rank(), parallel.data_parallel_size()
    mine = [(number, sample) for number in range(rank, len(questions), size) for sample in range(args.samples)]

    def requests() -> Iterator[Request]:
        for number, sample in mine:
            asked = questions[number]
            yield Request(
                id=f"{number} {sample}",
                turns=asked.turns,
                images=tuple(media.open_ref(ref, folder, asked.id)[0] for ref in asked.images),
                sampling=Sampling(
                    max_new_tokens=args.max_new_tokens,
                    temperature=args.temperature,
                    top_p=args.top_p,
                    seed=args.seed * SEEDS + number * args.samples + sample,
                ),
            )

    found: dict[tuple[int, int], str] = {}
    leads = dist.get_rank() == 0
    for done in tqdm(
        completions(engine, requests()), total=len(mine), desc="Answering", disable=not leads, mininterval=1
    ):
        number, sample = map(int, done.request_id.split())
        found[number, sample] = done.text.strip()
    everywhere: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    merged = {place: text for part in everywhere for place, text in part.items()}
    return [[merged[number, sample] for sample in range(args.samples)] for number in range(len(questions))]


def _write(args: argparse.Namespace, pairs: list[dict], asked: int, unclear: int) -> str:
    said = f"{unclear:,} of {asked * args.samples:,} answers are neither yes nor no and in no pair; " if unclear else ""
    if not pairs:
        raise DataError(
            f"none of the {asked} questions got answers that --scorer {args.scorer} tells apart; {said}raise --samples or "
            "--temperature, or let the truth take part (--with-truth)"
        )
    args.save.parent.mkdir(parents=True, exist_ok=True)
    with args.save.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    return f"{len(pairs):,} pairs of {asked:,} questions in {args.save}; {said}the others' answers are all as good\n"
