"""The checkpoint that a run starts from or goes on with, and the folder that it writes to."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_moellava.backbones import Backbone, backbone_fields
from megatron_moellava.checkpoint.base import base_of, base_to_load
from megatron_moellava.checkpoint.description import RunDescription, read_description
from megatron_moellava.checkpoint.folders import newest_checkpoint, require_checkpoint
from megatron_moellava.checkpoint.resume_point import newest_described
from megatron_moellava.config import CheckpointError, ConfigError, MoELlavaError, RunConfig, to_dict
from megatron_moellava.costs.shapes import Model
from megatron_moellava.placement import moe_layers
from megatron_moellava.towers import Tower, tower_fields
from megatron_moellava.towers.branches import branch_problems, branches_of_data
from megatron_moellava.validation.adapters import base_problems
from megatron_moellava.validation.resume import differences, refusal

# What in a folder says that it belongs to something else: it would be mixed up with a run's checkpoints.
FOREIGN = {
    "config.json": "a Hugging Face model",
    ".nv-meta": "a data set",
    "qwen.tiktoken": "a tokenizer",
    "tokenizer.model": "a tokenizer",
}


def checkpoint_problems(run: RunConfig, backbone: Backbone | None, tower: Tower | None) -> Iterator[str]:
    """Of `checkpoint.load` and `checkpoint.save`, from what the checkpoints say of themselves."""
    save, load = run.checkpoint.save, run.checkpoint.load
    if save is not None:
        yield from _writable(save)
        yield from _foreign(Path(save))
    elif run.checkpoint.ckpt_step is not None:
        yield "checkpoint.ckpt_step chooses among the checkpoints of checkpoint.save, which is not set; set it too"
    try:
        resumed = newest_described(save, run.checkpoint.ckpt_step) if save is not None else None
        if resumed is not None and backbone is not None:
            yield from _resumable(*resumed, run, backbone)[0]
        start = resumed[0] if resumed else require_checkpoint(load) if load is not None else None
        if start is None and run.training.lora is not None:
            yield "training.lora stands beside the weights of a trained model; give it as checkpoint.load"
        if start is None or backbone is None or tower is None:
            return
        description = read_description(start)
        given = f"checkpoint.{'save' if resumed else 'load'}={save if resumed else load}"
        yield from model_problems(given, description.model, run, backbone, tower)
        yield from base_problems(given, description, run)
        base_of(start, description, base_to_load(load))
    except MoELlavaError as error:
        yield str(error)


def check_resumable(checkpoint: Path, description: RunDescription, run: RunConfig, backbone: Backbone) -> list[str]:
    """Whether `run` may go on from a checkpoint in its own `checkpoint.save`; returns what the user has to be told.

    CheckpointError when it is of a conversion or another stage, ConfigError that names every value that may not change.
    """
    problems, noted = _resumable(checkpoint, description, run, backbone)
    if problems:
        raise ConfigError("\n".join(problems))
    return noted


def _resumable(
    checkpoint: Path, description: RunDescription, run: RunConfig, backbone: Backbone
) -> tuple[list[str], list[str]]:
    """(what is against it, what the user has to be told)"""
    stage = run.training.stage
    if description.optimizer_steps is None or description.stage != stage:
        made_by = "of a conversion" if description.optimizer_steps is None else f"of stage {description.stage}"
        raise CheckpointError(
            f"checkpoint.save={checkpoint.parent} holds a checkpoint {made_by} that cannot be continued as stage {stage}; "
            "choose another checkpoint.save (and start from that one with checkpoint.load)"
        )
    where = f"checkpoint.save={checkpoint.parent} ({checkpoint.name})"
    problems = list(_another_start(where, description, run.checkpoint.load))
    if description.config is None:  # of a very old version
        return problems, []
    found = differences(description.config, run, backbone)
    return [refusal(where, found.refused), *problems] if found.refused else problems, found.noted


def _another_start(where: str, description: RunDescription, load: str | None) -> Iterator[str]:
    """The start checkpoint is needed no more and may be gone or moved; another one would be passed over in silence."""
    then = (description.config or {}).get("checkpoint", {}).get("load")
    found = newest_checkpoint(load) if load is not None and load != then else None
    if found is None:
        return
    try:
        seal = read_description(found).checksum
    except CheckpointError:
        return
    source, stored = description.provenance.get("source"), description.provenance.get("source_seal")
    here = f"{found.parent.name}/{found.name}"
    if (stored != seal) if stored is not None else (source != here):
        yield (
            f"{where} started from {source or 'new weights'} (checkpoint.load={then}), and checkpoint.load={load} is another "
            f"checkpoint ({here}), which a run that goes on does not read; leave checkpoint.load out to go on, or choose "
            "another checkpoint.save to start from it"
        )


def model_problems(given: str, stored: dict, run: RunConfig, backbone: Backbone, tower: Tower) -> Iterator[str]:
    """Why the run's model cannot have the weights of a checkpoint; `given`: how the user named it, `stored`: its model."""
    if run.moe is not None and not stored.get("moe"):
        yield (
            f"{given} holds a dense model ({stored.get('backbone')}), and moe.* asks for experts; make them first: "
            "moellava convert upcycle"
        )
        return
    if run.moe is None and stored.get("moe"):
        yield f"{given} holds a MoE model, and this run sets moe to null; leave moe out, or load a dense checkpoint"
        return
    for section, option in (("tower_moe", "--tower-experts"), ("projector_moe", "--projector-experts")):
        if getattr(run, section) is not None and not stored.get(section):
            yield (
                f"{given} has no experts in its {section.removesuffix('_moe')}, and {section}.* asks for some; make them: "
                f"moellava convert upcycle {option} N"
            )
            return
    yield from (f"{given} {problem}" for problem in _branch_problems(stored, run))
    here = Model(backbone=backbone, tower=tower, moe=run.moe, tower_moe=run.tower_moe, projector_moe=run.projector_moe)
    differing = differing_fields(stored, here)
    if differing:
        held = ", ".join(str(stored[part]) for part in ("backbone", "tower") if stored.get(part))
        shared = next((text for text in differing if "moe_shared_expert_intermediate_size None there" in text), None)
        if shared:
            yield f"{given} has no shared expert ({shared}); make one first: moellava convert upcycle --shared-expert"
            return
        sections = "moe.*" if not (run.tower_moe or run.projector_moe) else "moe.*, tower_moe.* and projector_moe.*"
        listed = "; ".join(differing[:6]) + (f"; and {len(differing) - 6} more" if len(differing) > 6 else "")
        yield (
            f"{given} holds {held}, which is not the model of this run: {listed}; leave --backbone, --tower and {sections} out"
        )


def _branch_problems(stored: dict, run: RunConfig) -> Iterator[str]:
    """Of towers and projectors of modalities; nothing where one cannot be found, which `way_problems` says."""
    with contextlib.suppress(MoELlavaError):
        yield from branch_problems(stored, branches_of_data(run.data))


def differing_fields(stored: dict, model: Model) -> list[str]:
    """What a checkpoint's `model` section and a run contradict each other in: `backbone.rotary_base 1e4 there, 1e6 here`.

    Some of it changes no tensor's shape, and would only be seen in what the model says.
    """
    backbone, tower, moe = model.backbone, model.required_tower, model.moe
    here = {
        "backbone": backbone_fields(backbone),
        "tower": tower_fields(tower),
        "moe": _moe_fields(to_dict(moe) if moe else None, backbone.num_layers),
        "tower_moe": _vision_fields(to_dict(model.tower_moe) if model.tower_moe else None, tower.num_used_layers),
        "projector_moe": _vision_fields(to_dict(model.projector_moe) if model.projector_moe else None, 1),
    }
    there = {
        "tower_moe": _vision_fields(stored.get("tower_moe"), tower.num_used_layers),
        "projector_moe": _vision_fields(stored.get("projector_moe"), 1),
        "backbone": stored.get("backbone_fields") or {},  # a converter of another program may not describe its model
        "tower": stored.get("tower_fields") or {},
        "moe": _moe_fields(stored.get("moe"), (stored.get("backbone_fields") or here["backbone"])["num_layers"]),
    }
    plain = json.loads(json.dumps(here))
    return [
        f"{section}.{name} {there[section][name]} there, {value} here"
        for section, fields in plain.items()
        for name, value in fields.items()
        if name not in _FREE_FIELDS and name in there[section] and there[section][name] != value
    ]


# A name, how long rows may be, how large pictures are, and what regularises training are no part of what the weights mean.
_FREE_FIELDS = (
    "name",
    "source",
    "family",
    "template",
    "max_position_embeddings",
    "max_num_patches",
    "attention_dropout",
    "hidden_dropout",
    "moe",  # compared as the run's
)


def _vision_fields(moe: dict | None, num_layers: int) -> dict:
    """The fields of a run's section tower_moe or projector_moe that its tensors depend on."""
    if moe is None:
        return {"num_moe_experts": None}
    placement = moe.get("placement", (0,))
    placement = placement if isinstance(placement, str) else tuple(placement)
    layers = moe_layers(placement, num_layers, "tower_moe.placement")
    return {"num_moe_experts": moe["num_moe_experts"], "layers": list(layers)}


def _moe_fields(moe: dict | None, num_layers: int) -> dict:
    """The fields of a run's MoE section that its tensors depend on."""
    if moe is None:
        return {"num_moe_experts": None}
    placement = moe["placement"]
    names = (
        "num_moe_experts",
        "moe_ffn_hidden_size",
        "use_residual",
        "moe_shared_expert_intermediate_size",
        "moe_shared_expert_gate",
    )
    return {name: moe[name] for name in names if name in moe} | {"layers": list(moe_layers(placement, num_layers))}


def _writable(save: str) -> Iterator[str]:
    """A folder that cannot be written to would be noticed at the first checkpoint, hours later."""
    existing = next(path for path in (Path(save), *Path(save).absolute().parents) if path.exists())
    if not existing.is_dir():
        yield f"checkpoint.save={save}: {existing} is not a folder; choose another one"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"checkpoint.save={save} cannot be written to ({existing} is read-only for this user); choose another folder"


def _foreign(save: Path) -> Iterator[str]:
    """A folder that holds something else, or half a checkpoint that a run would take for none."""
    for name, what in FOREIGN.items():
        if (save / name).exists():
            yield f"checkpoint.save={save} holds {what} ({name}); choose a folder of its own for the run"
            return
    if save.is_dir() and newest_checkpoint(save) is None:
        halves = sorted(path.name for path in save.glob("iter_*") if path.is_dir() and not path.suffix)
        if halves:
            yield (
                f"checkpoint.save={save} holds no complete checkpoint, but {', '.join(halves)} without run.json: the copy "
                "or the conversion was interrupted; copy it anew, or remove it to start again"
            )
