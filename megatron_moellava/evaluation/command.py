"""What moellava evaluate calls: from its arguments to files and a table."""

import argparse

from megatron_moellava.config import ConfigError
from megatron_moellava.evaluation.judge import Judge
from megatron_moellava.evaluation.own import OwnQuestions
from megatron_moellava.evaluation.report import write_summary
from megatron_moellava.evaluation.runner import Options, score_file
from megatron_moellava.evaluation.task import Task
from megatron_moellava.evaluation.tasks import TASKS, get_task


def list_tasks() -> str:
    """One paragraph per benchmark: the name to give, the files it needs and where they come from."""
    return "\n".join(_describe(task) for task in TASKS.values())


def _describe(task: Task) -> str:
    files = ", ".join(name for name in (task.questions, task.images, *task.needs) if name not in ("", "."))
    scored = "scored here" if task.score else f"scored by {task.server}"
    judged = f", needs a judge (the original's: {task.judge})" if task.judge else ""
    return f"{task.name:12} {task.title}: {scored}{judged}\n{'':13}{task.folder}/: {files}\n{'':13}from {task.origin}"


def chosen_tasks(names: str) -> list[Task]:
    """`"pope,gqa"` -> the tasks. ConfigError for none or an unknown name."""
    tasks = [get_task(name.strip()) for name in names.split(",") if name.strip()]
    if not tasks:
        raise ConfigError(f"benchmark is empty: name one or more of {', '.join(TASKS)}, separated by commas")
    return tasks


def judge_of(args: argparse.Namespace) -> Judge | None:
    """The judge that the arguments name, or None. ConfigError where URL and model are not given together."""
    if bool(args.judge_url) != bool(args.judge_model):
        raise ConfigError("--judge-url and --judge-model go together: give both or neither")
    return (
        Judge(url=args.judge_url, model=args.judge_model, key_variable=args.judge_key_variable)
        if args.judge_url
        else None
    )


def options_of(args: argparse.Namespace) -> Options:
    """`Options` from the arguments. ConfigError for a negative limit or fewer than two bootstrap samples."""
    if args.limit < 0:
        raise ConfigError(f"limit={args.limit} must be 0 (all questions) or a positive number")
    if args.bootstrap < 2:
        raise ConfigError(f"bootstrap={args.bootstrap} must be at least 2; 1000 is usual")
    return Options(
        limit=args.limit,
        circular=args.circular,
        blank_images=args.blank_images,
        temperature=args.temperature,
        bootstrap_samples=args.bootstrap,
    )


def own_questions(args: argparse.Namespace) -> OwnQuestions | None:
    """--questions and what belongs to it; ConfigError for what does not go with it."""
    if args.questions is None:
        alone = {
            "--answers": args.answers,
            "--image-folder": args.image_folder,
            "--max-new-tokens": args.max_new_tokens,
        }
        given = [name for name, value in alone.items() if value is not None]
        if given or args.image_aspect_ratio != "model":
            raise ConfigError(
                f"{(given or ['--image-aspect-ratio'])[0]} belongs to --questions FILE; a benchmark has its own"
            )
        return None
    if args.benchmark or args.score_only or args.circular:
        raise ConfigError("--questions asks a file of one's own: leave out --benchmark, --score-only and --circular")
    if not args.load:
        raise ConfigError("--questions needs a model to ask; give --load CKPT")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ConfigError(f"max-new-tokens={args.max_new_tokens} must be at least 1")
    return OwnQuestions(
        file=args.questions.expanduser(),
        images=args.image_folder.expanduser() if args.image_folder else None,
        max_new_tokens=args.max_new_tokens or 1024,
        image_aspect_ratio=args.image_aspect_ratio,
    )


def score_predictions(args: argparse.Namespace) -> str:
    """--score-only: the table over everything scored so far into --out.

    Raises ConfigError unless it is one file for one benchmark.
    """
    own_questions(args)
    tasks = chosen_tasks(args.benchmark)
    if args.score_only is None:
        raise ConfigError("give --load CKPT, or --score-only FILE: a JSONL with question_id and text a line")
    if len(tasks) > 1:
        raise ConfigError(f"benchmark={args.benchmark!r}: --score-only scores one file, so name one benchmark")
    score_file(
        tasks[0],
        args.data,
        args.out,
        args.score_only,
        model=args.model_name or args.score_only.stem,
        judge=judge_of(args),
        options=options_of(args),
    )
    return write_summary(args.out)
