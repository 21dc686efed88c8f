"""Make rows of preferences (stage 4) of a checkpoint's own answers, ranked by what is known to be true.

moellava make-preferences --load runs/stage3 --data tune.json --image-folder images --save pairs.jsonl
moellava make-preferences --load runs/stage3 --data tune.json --image-folder images --save pairs.jsonl --scorer poll
moellava launch --nproc-per-node 8 make-preferences --load runs/stage3 --data tune.json --save pairs.jsonl --scorer judge \\
    --judge-url http://localhost:8000/v1 --judge-model NAME

Every answer of the rows becomes a question. The model answers it --samples times at --temperature; where the scorer tells
the answers apart, the best and the worst are a pair. Scorers: exact (is it the row's answer?), poll (POPE's protocol on the
rows' pictures: is there a ...?), judge (an OpenAI-compatible server grades it beside the row's answer).
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
    """The options of `moellava make-preferences`."""
    parser = command_parser("make-preferences", __doc__)
    parser.add_argument("--load", required=True, metavar="CKPT", help="the checkpoint that answers")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="LLaVA rows whose answers are true")
    parser.add_argument(
        "--image-folder", type=Path, metavar="DIR", help="where their pictures lie (the file's own folder)"
    )
    parser.add_argument(
        "--save", required=True, type=Path, metavar="JSONL", help="rows of preferences, for train --stage 4"
    )
    parser.add_argument(
        "--scorer", default="exact", choices=("exact", "poll", "judge"), help="what ranks answers (exact)"
    )
    parser.add_argument("--samples", type=COUNT, default=8, help="answers to each question (8)")
    parser.add_argument("--temperature", type=number(float, above=0), default=1.0, help="of the answers (1.0)")
    parser.add_argument(
        "--top-p", type=number(float, above=0, most=1), default=1.0, help="nucleus of the answers (1.0)"
    )
    parser.add_argument("--max-new-tokens", type=COUNT, default=256, help="tokens of an answer (256)")
    parser.add_argument("--with-truth", action="store_true", help="the row's own answer takes part, as the best one")
    parser.add_argument("--limit", type=number(int, least=0), default=0, help="only the first N questions (0: all)")
    parser.add_argument("--seed", type=number(int, least=0), default=0, help="of the answers (0)")
    add_reading_options(parser)
    parser.add_argument("--batch-size", type=COUNT, default=32, help="answers made at the same time (32)")
    add_judge_options(parser, "the model that judges")
    add_memory_options(parser)
    add_layout_options(parser)
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the rows, say how many, and return the exit code."""
    args = parse_args(argv)
    choose_machine(args)
    from megatron_moellava.config import MoELlavaError
    from megatron_moellava.evaluation.make_preferences import make_preferences

    try:
        print(make_preferences(args), end="")
    except (MoELlavaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)
    return 0
