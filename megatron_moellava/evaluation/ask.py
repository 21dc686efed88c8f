"""What `evaluate --load` calls: a checkpoint answers benchmarks or own questions, under the layout of the command line."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_moellava import parallel
from megatron_moellava.evaluation.command import chosen_tasks, judge_of, options_of, own_questions
from megatron_moellava.evaluation.generation import CheckpointAnswers
from megatron_moellava.evaluation.own import ask
from megatron_moellava.evaluation.predictions import Place
from megatron_moellava.evaluation.report import write_summary
from megatron_moellava.evaluation.runner import evaluate
from megatron_moellava.inference.load import engine_of


def ask_checkpoint(args: argparse.Namespace) -> str:
    """The table over everything scored so far into --out, on the leading process; the others return an empty text."""
    own, options = own_questions(args), options_of(args)
    tasks, judge = ([], None) if own else (chosen_tasks(args.benchmark), judge_of(args))
    if own:
        own.read()  # a wrong file is said before the model is loaded
    engine = engine_of(args, max_batch_size=args.batch_size)
    place = Place(
        rank=parallel.data_parallel_rank(),
        world_size=parallel.data_parallel_size(),
        writes=parallel.reads_data(),
        barrier=dist.barrier,  # type: ignore[arg-type]  # overloaded
    )
    name = args.model_name or Path(args.load).resolve().name
    answers = CheckpointAnswers(engine)
    try:
        if own:
            own = replace(own, modalities=tuple(item.name for item in engine.prompter.data.modalities))
            return ask(own, args.out, answers, model=name, place=place, options=options, answers=args.answers)
        for task in tasks:
            evaluate(
                task,
                args.data,
                args.out,
                answers,
                model=name,
                judge=judge,
                place=place,
                options=options,
            )
    finally:
        parallel.shutdown()
    return write_summary(args.out) + "\n" if place.leads else ""
