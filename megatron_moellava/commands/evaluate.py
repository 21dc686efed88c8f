"""Ask a checkpoint the paper's benchmarks, score the answers, and put the paper's rows beside ours.

moellava evaluate --list
moellava evaluate --load runs/stage3 --benchmark pope,gqa --data eval --out runs/eval
moellava launch --nproc-per-node 8 evaluate --load runs/stage3 --benchmark pope parallel.expert_model_parallel_size=4
moellava evaluate --benchmark pope --data eval --score-only answers.jsonl --out runs/eval
moellava evaluate --load runs/stage3 --questions mine.jsonl --image-folder pictures --answers answers.jsonl

An interrupted run goes on where it stopped when the same command is given again.
"""

import argparse
import sys
from pathlib import Path

from megatron_moellava.commands.program import (
    COUNT,
    add_judge_options,
    add_layout_options,
    add_memory_options,
    add_reading_options,
    choose_machine,
    command_parser,
    exit_code_of,
    number,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of `moellava evaluate`."""
    parser = command_parser("evaluate", __doc__)
    parser.add_argument("--benchmark", default="", help="names separated by commas (--list shows them)")
    parser.add_argument(
        "--data", type=Path, default=Path("eval"), help="folder in the layout of LLaVA's eval.zip (eval)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/eval"), help="predictions, scores and table (runs/eval)")
    parser.add_argument(
        "--score-only", type=Path, metavar="JSONL", help="score this file of answers (question_id, text)"
    )
    parser.add_argument(
        "--questions", type=Path, metavar="JSONL", help="ask these: question_id, image (a name, a list, or none), text"
    )
    parser.add_argument("--image-folder", type=Path, help="of --questions: where its pictures lie (its own folder)")
    parser.add_argument("--answers", type=Path, metavar="JSONL", help="of --questions: also write the answers here")
    parser.add_argument("--max-new-tokens", type=int, help="of --questions: tokens of an answer (1024)")
    parser.add_argument(
        "--image-aspect-ratio",
        default="model",
        choices=("model", "square"),
        help="of --questions: as the model was trained, or unpadded as the original's model_vqa (model)",
    )
    parser.add_argument("--load", default="", metavar="CKPT", help="ask this checkpoint")
    add_reading_options(parser)
    parser.add_argument("--batch-size", type=COUNT, default=32, help="questions answered at the same time (32)")
    parser.add_argument("--temperature", type=number(float, least=0), default=0.0, help="0: greedy (0)")
    parser.add_argument("--blank-images", action="store_true", help="grey pictures: what the model answers unseeing")
    parser.add_argument("--model-name", default="", help="our row's name in the table and in submission files")
    parser.add_argument("--limit", type=int, default=0, help="only the first N questions (0: all)")
    parser.add_argument(
        "--circular", action="store_true", help="MMBench: ask every question once per rotation of options"
    )
    parser.add_argument("--bootstrap", type=int, default=1000, help="bootstrap samples of the standard error (1000)")
    add_judge_options(parser, "the model that judges LLaVA-Bench and MM-Vet")
    add_memory_options(parser)
    add_layout_options(parser)
    parser.add_argument("--list", action="store_true", help="show the benchmarks and what each folder must hold")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Ask or score benchmarks, print the table, and return the exit code."""
    args = parse_args(argv)
    choose_machine(args)
    from megatron_moellava.config import MoELlavaError
    from megatron_moellava.evaluation import command

    try:
        if args.list:
            print(command.list_tasks())
        elif args.load:
            from megatron_moellava.evaluation.ask import ask_checkpoint

            print(ask_checkpoint(args), end="")
        else:
            print(command.score_predictions(args))
    except (MoELlavaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)
    return 0
