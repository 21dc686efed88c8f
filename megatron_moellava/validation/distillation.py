"""A run with a teacher: what its logits are of, as far as it can be known without reading the rows.

The rows themselves and the tokenizer's words are compared where the run begins (`training/distillation.py`).
"""

from collections.abc import Iterator
from pathlib import Path

from megatron_moellava.config import DataError, MoELlavaError, RunConfig
from megatron_moellava.data.teacher_logits import incomplete, read_teacher
from megatron_moellava.data.templates import Template
from megatron_moellava.stages import DISTILLED
from megatron_moellava.validation.tokenizer import read_tokenizer


def distillation_problems(run: RunConfig, template: Template | None) -> Iterator[str]:
    """Of `training.distillation`, the folder with the teacher's logits included."""
    options, stage = run.training.distillation, run.training.stage
    if options is None:
        return
    if stage not in DISTILLED:
        stages = " and ".join(map(str, DISTILLED))
        yield f"training.distillation is about stages {stages}, and this is stage {stage}; leave it out"
        return
    folder = Path(options.teacher_logits).expanduser()
    given = "training.distillation.teacher_logits="
    try:
        description = read_teacher(folder)
    except DataError as error:
        yield f"{given}{error}"
        return
    yield from (given + sentence for sentence in incomplete(folder, description))
    size = _vocab_size(run)
    if size is not None and size != description.vocab_size:
        yield (
            f"{given}{folder} is of a tokenizer with {description.vocab_size} tokens, and data.tokenizer={run.data.tokenizer} "
            f"has {size}: teacher and student must share the tokenizer; distil from a teacher that has this one"
        )
    now = {"template": template.version if template else None, "label_mode": run.data.label_mode}
    for name, value in now.items():
        then = description.labels.get(name)
        if value is not None and then != value:
            yield (
                f"{given}{folder} was written with data.{name}={then}, and this run has {value}: the labels would be others; "
                f"set data.{name}={then}, or write the logits anew with this one"
            )


def _vocab_size(run: RunConfig) -> int | None:
    """None where the tokenizer cannot be read, which others say."""
    path = Path(run.data.tokenizer).expanduser()
    if not run.data.tokenizer or not path.exists():
        return None
    try:
        return read_tokenizer(path).vocab_size
    except MoELlavaError:
        return None
