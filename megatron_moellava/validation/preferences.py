"""Stage 4: what pairs of answers need of the data, and the reference that they are compared with."""

from collections.abc import Iterator

from megatron_moellava.backbones import Backbone
from megatron_moellava.checkpoint.base import SEAL_FIRST
from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.checkpoint.resume_point import newest_described
from megatron_moellava.config import CheckpointError, PreferenceConfig, RunConfig
from megatron_moellava.stages import PREFERENCE
from megatron_moellava.towers import Tower
from megatron_moellava.validation.checkpoints import model_problems


def preference_problems(run: RunConfig, backbone: Backbone | None, tower: Tower | None) -> Iterator[str]:
    """Of `preference` and of a run of stage 4, files of the reference included."""
    options, data = run.preference, run.data
    if run.training.stage != PREFERENCE:
        if options != PreferenceConfig():
            yield f"preference.* is about training.stage={PREFERENCE}, and this is stage {run.training.stage}; leave it out"
        return
    if not data.packing:
        yield f"data.packing=false: stage {PREFERENCE} packs both answers of a pair into one row; set data.packing=true"
    if data.label_mode == "original":
        yield f"data.label_mode=original may mask an answer, and stage {PREFERENCE} compares all of it; use spans"
    if data.template in ("plain", "v0_plain"):
        yield f"data.template={data.template} drops the prompt, to which the answers of a pair belong; use another one"
    if not (options.loss_coeff or options.quality_coeff or options.sft_coeff):
        yield "preference: loss_coeff, quality_coeff and sft_coeff are all 0, so nothing would be trained; set one"
    try:
        yield from _reference_problems(run, backbone, tower)
    except CheckpointError as error:
        yield str(error)


def _reference_problems(run: RunConfig, backbone: Backbone | None, tower: Tower | None) -> Iterator[str]:
    options, checkpoint = run.preference, run.checkpoint
    reference = options.reference or checkpoint.load
    resumed = newest_described(checkpoint.save, checkpoint.ckpt_step) if checkpoint.save else None
    if resumed is not None:  # its reference is known by its seal, and its log-probabilities are there
        return
    if reference is None:
        yield (
            f"training.stage={PREFERENCE} compares with a reference, and there is none: give the model that it starts from as "
            "checkpoint.load (or another one as preference.reference)"
        )
        return
    if checkpoint.load is None:
        yield f"training.stage={PREFERENCE} starts from a trained model; give it as checkpoint.load"
    description = read_description(require_checkpoint(reference))
    given = f"{'preference.reference' if options.reference else 'checkpoint.load'}={reference}"
    if description.checksum is None:
        yield f"{given} has no seal by which its log-probabilities could name it; {SEAL_FIRST}"
    if options.reference and backbone is not None and tower is not None:  # of checkpoint.load others say it
        yield from model_problems(given, description.model, run, backbone, tower)
