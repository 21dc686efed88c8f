"""Score answers to the paper's benchmarks, with the paper's rows beside ours.

This version scores files of answers; it cannot ask a checkpoint (that needs the generation engine).

python tools/evaluate.py --benchmark pope --data eval --score-only answers.jsonl --out runs/eval
python tools/evaluate.py --list
"""

import argparse
import sys
from pathlib import Path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", default="", help="names separated by commas (--list shows them)")
    parser.add_argument(
        "--data", type=Path, default=Path("eval"), help="folder in the layout of LLaVA's eval.zip (eval)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/eval"), help="predictions, scores and table (runs/eval)")
    parser.add_argument(
        "--score-only", type=Path, metavar="JSONL", help="score this file of answers (question_id, text)"
    )
    parser.add_argument("--model-name", default="", help="our row's name in the table and in submission files")
    parser.add_argument("--limit", type=int, default=0, help="only the first N questions (0: all)")
    parser.add_argument(
        "--circular", action="store_true", help="MMBench: ask every question once per rotation of options"
    )
    parser.add_argument("--bootstrap", type=int, default=1000, help="bootstrap samples of the standard error (1000)")
    parser.add_argument(
        "--judge-url", default="", help="base of an OpenAI-compatible server, as http://localhost:8000/v1"
    )
    parser.add_argument("--judge-model", default="", help="the model that judges LLaVA-Bench and MM-Vet")
    parser.add_argument(
        "--judge-key-variable", default="OPENAI_API_KEY", help="environment variable with the judge's key"
    )
    parser.add_argument("--list", action="store_true", help="show the benchmarks and what each folder must hold")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from megatron_moellava.config import MoELlavaError
    from megatron_moellava.evaluation import command

    try:
        print(command.list_tasks() if args.list else command.score_predictions(args))
    except MoELlavaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
