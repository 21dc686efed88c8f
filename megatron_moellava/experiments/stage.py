"""One stage of a chain in this process group: train it, then ask it held-out questions. The quickstart and ablations."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moellava import parallel, platform
from megatron_moellava.config import MoELlavaError, RunConfig
from megatron_moellava.data.loader import build_encoder
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.evaluation.closed_questions import predict
from megatron_moellava.evaluation.quickstart.metrics import score_quickstart
from megatron_moellava.exit_codes import INTERRUPTED
from megatron_moellava.model.precision import settle_and_say
from megatron_moellava.routing.records import RoutingSums
from megatron_moellava.training.loop import Trainer
from megatron_moellava.training.run import build_trainer
from megatron_moellava.validation.run import validate_run


class Interrupted(MoELlavaError):
    """A signal has stopped the run; its checkpoint is written."""

    exit_code = INTERRUPTED


@dataclass(frozen=True, slots=True)
class Answers:
    """What a trained stage answers to held-out questions."""

    score: dict  # evaluation.quickstart.metrics.score_quickstart
    answered: list[dict]  # the rows with `prediction` and `loss`
    routing: RoutingSums | None  # of the questions, in the language model; None: dense
    blanked: list[dict] | None  # the same rows with blank pictures


def train_stage(run: RunConfig) -> Trainer:
    """Train a validated run to its end under its own layout. Raises Interrupted, TrainingDiverged, ConfigError."""
    validate_run(run, platform.machine())
    parallel.initialize(run.parallel, run.training.seed)
    trainer = build_trainer(settle_and_say(run))
    if trainer.train() != 0:
        raise Interrupted(f"interrupted at step {trainer.state.iteration}; the same command continues")
    return trainer


def ask_closed(
    trainer: Trainer, run: RunConfig, rows: Sequence[dict], image_folder: Path, *, blank: bool = False
) -> Answers:
    """Closed questions {image, question, answer, type} to the trained model. `blank`: also without the pictures."""
    encoder = build_encoder(
        run.data, load_tokenizer(run.data.tokenizer), trainer.chunks[0].tower, _template(run, trainer)
    )
    statistics = trainer.routing.get("language")
    if statistics is not None:
        statistics.collect()  # what training has left
    said = predict(trainer.chunks, encoder, rows, image_folder, statistics=statistics)
    answered = [row | answer for row, answer in zip(rows, said, strict=True)]
    routing = statistics.collect() if statistics is not None else None
    blanked = None
    if blank:
        said = predict(trainer.chunks, encoder, rows, image_folder, blank=True)
        blanked = [row | answer for row, answer in zip(rows, said, strict=True)]
    return Answers(score_quickstart(answered), answered, routing, blanked)


def _template(run: RunConfig, trainer: Trainer) -> str:
    return run.data.template or trainer.chunks[0].backbone.template
