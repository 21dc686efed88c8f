"""Write a teacher's logits for a distillation: at every label of the rows its likeliest tokens, and how likely they are.

moellava make-teacher --load runs/large/stage3 --data tune.json --image-folder images --save runs/teacher --config stage3.yaml
moellava launch --nproc-per-node 8 make-teacher --load runs/large/stage3 --data tune.json --save runs/teacher \\
    --config stage3.yaml parallel.tensor_model_parallel_size=2
moellava train --stage 3 --config stage3.yaml --data tune.json --image-folder images --load runs/moe --save runs/student \\
    training.distillation.teacher_logits=runs/teacher

Rows, tokenizer, template and limits of length must be the student's: give its --config, of which `data` and `parallel` are
read. Teacher and student may have different language models and towers. An interrupted run goes on where it stopped when the
same command is given again, under any layout.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from megatron_moellava.commands.program import COUNT, SETTING, command_parser, exit_code_of
from megatron_moellava.machine import choose

SECTIONS = ("data", "parallel")  # of --config
DTYPES = ("float16", "float32")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of `moellava make-teacher`; settings that follow `--data FILE` count as overrides."""
    parser = command_parser("make-teacher", __doc__)
    parser.add_argument("--load", required=True, metavar="CKPT", help="the teacher")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="PATH", help="the student's LLaVA JSON files or WebDataset folders"
    )
    parser.add_argument("--image-folder", default="", metavar="DIR", help="image paths of the rows are relative to it")
    parser.add_argument(
        "--save", required=True, type=Path, metavar="DIR", help="training.distillation.teacher_logits of the student"
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="the student's run; `data` and `parallel` are read")
    parser.add_argument("--top-k", type=COUNT, default=32, help="tokens at each label; all others are one number (32)")
    parser.add_argument("--dtype", default="float16", choices=DTYPES, help="of the log-probabilities (float16)")
    parser.add_argument("--rows-per-shard", type=COUNT, default=512, help="what an interruption loses at most (512)")
    parser.add_argument(
        "--validate-only", action="store_true", help="check the run and the files, then exit with 0 or 2"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="e.g. data.tokenizer=FOLDER")
    parsed = parser.parse_intermixed_args(argv)
    parsed.overrides += [item for item in parsed.data if SETTING.match(item)]
    parsed.data = [item for item in parsed.data if not SETTING.match(item)]
    return parsed


def main(argv: list[str] | None = None) -> int:
    """Write the logits, say how many, and return the exit code."""
    args = parse_args(argv)
    from megatron_moellava.config import MoELlavaError

    try:
        run = teacher_run(args)
        if args.validate_only:
            from megatron_moellava.validation.run import validate_run

            validate_run(run)
            print("the run is valid")
            return 0
        choose(run.training.device, run.training.transformer_impl)  # before torch looks for GPUs
        from megatron_moellava.training.teacher import make_teacher

        make_teacher(run, args.save, top_k=args.top_k, dtype=args.dtype, rows_per_shard=args.rows_per_shard)
    except (MoELlavaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)
    return 0


def teacher_run(args: argparse.Namespace):
    """The run whose rows and layout the pass has. It trains nothing: the stage stands for any, the batch fits any layout."""
    from megatron_moellava.checkpoint.folders import require_checkpoint
    from megatron_moellava.validation.run import load_run, world_size

    require_checkpoint(args.load)  # it says what the model is
    run = load_run(
        config=args.config,
        flags={
            "training.stage": 2,
            "checkpoint.load": args.load,
            "data.sources": [{"path": path, "image_folder": args.image_folder} for path in args.data],
        },
        overrides=[*args.overrides, "data.sampler=shuffle"],
        sections=SECTIONS,
    )
    rows = run.training.micro_batch_size * world_size()
    return replace(run, training=replace(run.training, global_batch_size=rows))
