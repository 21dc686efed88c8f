"""From a command line to a run that can work, or to one error that lists everything that is wrong with it."""

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from megatron_moellava import typed_tree
from megatron_moellava.backbones import BACKBONES, Backbone, backbone_fields, get_backbone
from megatron_moellava.checkpoint.description import read_description, trained_with
from megatron_moellava.checkpoint.folders import newest_checkpoint
from megatron_moellava.checkpoint.resume_point import newest_described
from megatron_moellava.config import ConfigError, MoELlavaError, RunConfig, read_yaml, set_override, split_override
from megatron_moellava.data.templates import get_template
from megatron_moellava.machine import GPU_CLUSTER, Machine, this_machine
from megatron_moellava.towers import TOWERS, tower_fields, tower_of_run
from megatron_moellava.towers.branches import completed
from megatron_moellava.validation.adapters import adapter_problems
from megatron_moellava.validation.checkpoints import checkpoint_problems
from megatron_moellava.validation.data import data_problems, length_problems
from megatron_moellava.validation.distillation import distillation_problems
from megatron_moellava.validation.expert_places import expert_place_problems
from megatron_moellava.validation.experts import expert_problems
from megatron_moellava.validation.layout import parallel_problems
from megatron_moellava.validation.modalities import way_problems
from megatron_moellava.validation.numbers import number_problems
from megatron_moellava.validation.pictures import least_features, picture_problems
from megatron_moellava.validation.precision import decided
from megatron_moellava.validation.preferences import preference_problems
from megatron_moellava.validation.tokenizer import tokenizer_problems
from megatron_moellava.validation.training import (
    batch_problems,
    muon_layout_problems,
    profile_problems,
    tracker_problems,
    training_problems,
)
from megatron_moellava.validation.vision_experts import tower_expert_problems, vision_expert_problems

# Folders that a run writes to, or starts from: no shell has put in the home folder for `~` in a YAML file.
FOLDERS = (("checkpoint", "save"), ("checkpoint", "load"), ("logging", "directory"))


def load_run(
    *,
    config: str | None = None,
    flags: dict[str, object],
    overrides: Sequence[str] = (),
    sections: Collection[str] | None = None,
) -> RunConfig:
    """The run of a command line. Weakest first: the model of the loaded checkpoint, the YAML file, flags, overrides.

    `flags`: dotted path -> value; empty values count as not given. `sections`: those that are read of the YAML file; None:
    all. ConfigError lists all problems, also those that the rules find in what can be understood.
    """
    given = read_yaml(config) if config else {}
    if sections is not None:
        given = {section: fields for section, fields in given.items() if section in sections}
    for name, value in flags.items():
        if value:
            set_override(given, name, value)
    for override in overrides:
        set_override(given, *split_override(override))
    for section, name in FOLDERS:
        fields = given.get(section)
        if isinstance(fields, dict) and isinstance(fields.get(name), str):
            fields[name] = os.path.expanduser(fields[name])
    start = _start(given.get("checkpoint"))
    tree = _model_of_checkpoint(start) if start else {}
    if isinstance(given.get("model"), dict):
        given["model"] = {part: value for part, value in given["model"].items() if not _is_gone(part, value, tree)}
    if "moe" not in tree:
        tree |= experts_of_backbone(given.get("model"))
    for section, fields in given.items():
        tree[section] = {**tree[section], **fields} if section in tree and isinstance(fields, dict) else fields
    if start and isinstance(tree.get("data"), dict) and "modalities" in tree["data"]:
        stored = read_description(start).model
        tree["data"] = tree["data"] | {"modalities": completed(tree["data"]["modalities"], stored, start)}
    run, problems = typed_tree.build(RunConfig, tree)
    if problems:
        rules = run_problems(run, world_size()) if run is not None else []
        raise ConfigError("\n".join([*problems, *_about_other_fields(rules, problems)]))
    return run


def _about_other_fields(rules: list[str], problems: list[str]) -> list[str]:
    """Without those that come of a field whose value could not be used: it has its default there."""
    wrong = tuple(found[0] for problem in problems if (found := re.match(r"\w+\.\w+", problem)))
    return [rule for rule in rules if not rule.startswith(wrong)] if wrong else rules


def _start(options: object) -> Path | None:
    """The checkpoint that a run goes on with, or starts from."""
    save, load = (options.get("save"), options.get("load")) if isinstance(options, dict) else (None, None)
    resumed = newest_described(str(save)) if save else None
    return resumed[0] if resumed else newest_checkpoint(str(load)) if load else None


def _model_of_checkpoint(found: Path) -> dict:
    """Its sections `model` and `moe`."""
    description = read_description(found)
    model = trained_with(description).get("model", {}) | model_names(found)
    experts = {name: description.model.get(name) for name in ("moe", "tower_moe", "projector_moe")}
    return {"model": model} | {name: dict(fields) for name, fields in experts.items() if fields}


def experts_of_backbone(model: object) -> dict:
    """Section `moe` of a run whose backbone has experts of its own: what is not said is the backbone's."""
    name = model.get("backbone") if isinstance(model, dict) else None
    try:
        moe = get_backbone(name).moe if isinstance(name, str) else None
    except MoELlavaError:  # run_problems says it
        return {}
    return {"moe": dataclasses.asdict(moe)} if moe else {}


def _is_gone(part: str, value: object, stored: dict) -> bool:
    """Whether a model's folder is gone that a checkpoint describes: a run that goes on needs it no more."""
    is_path = isinstance(value, str) and "/" in value
    return part in stored.get("model", {}) and is_path and not Path(str(value)).expanduser().exists()


def model_names(checkpoint: Path) -> dict:
    """`model.backbone` and `model.tower` of a run that goes on from a checkpoint.

    A known name, if that is what the checkpoint holds; else the checkpoint itself, which has every field: it may come from
    a folder that is gone, or have another feature layer.
    """
    model = read_description(checkpoint).model
    known: dict[str, tuple[dict, Callable]] = {
        "backbone": (BACKBONES, backbone_fields),
        "tower": (TOWERS, tower_fields),
    }
    return {
        part: model[part]
        if model[part] in registry and fields_of(registry[model[part]]) == model.get(f"{part}_fields")
        else str(checkpoint)
        for part, (registry, fields_of) in known.items()
        if model.get(part) is not None
    }


def world_size() -> int:
    """Processes that torchrun (or SLURM) has been asked for."""
    return int(os.environ.get("WORLD_SIZE", 1))


def validate_run(run: RunConfig, machine: Machine | None = None) -> None:
    """Raises ConfigError when the run cannot work with the processes that torchrun (or SLURM) has been asked for."""
    validate(run, world_size(), machine)


def validate(run: RunConfig, world_size: int, machine: Machine | None = None) -> None:
    """Raises ConfigError that lists every problem of the run on `world_size` processes: field, value, rule, fix.

    `machine`: what the processes run on; None: as far as it can be told without torch.
    """
    problems = run_problems(run, world_size, machine)
    if problems:
        raise ConfigError("\n".join(problems))


def run_problems(run: RunConfig, world_size: int, machine: Machine | None = None) -> list[str]:
    """Every problem of a run, files included."""
    machine = machine or this_machine(run.training.device, run.training.transformer_impl)
    run, _ = decided(run, machine)
    problems: list[str] = []
    backbone = _found(lambda: get_backbone(run.model.backbone), problems)
    tower = _found(lambda: tower_of_run(run), problems)
    template = _found(lambda: get_template(run.data.template or (backbone.template if backbone else "v1")), problems)
    found = [*problems, *number_problems(run), *data_problems(run, least_features(tower))]
    found += tokenizer_problems(run, backbone, template)
    found += checkpoint_problems(run, backbone, tower)
    found += preference_problems(run, backbone, tower)
    found += distillation_problems(run, template)
    found += expert_place_problems(run)
    if backbone is None:
        return [*found, *batch_problems(run, world_size), *training_problems(run, machine)]
    if tower is not None:
        apart, misplaced = list(way_problems(run.data, tower)), list(tower_expert_problems(run, tower))
        found += [*picture_problems(run, tower), *apart, *misplaced]
        if not apart and not misplaced:  # adapters are read off the list of the model's tensors
            found += adapter_problems(run, backbone, tower)
        if apart:  # what follows counts them
            return found
    return [*found, *_sizes(run, backbone, world_size, machine)]


def layout_problems(run: RunConfig, backbone: Backbone, world_size: int) -> list[str]:
    """The problems that do not depend on files or on this machine: what the planner asks before it suggests a layout."""
    run, _ = decided(run, GPU_CLUSTER)
    return [*number_problems(run), *_sizes(run, backbone, world_size, GPU_CLUSTER)]


def _sizes(run: RunConfig, backbone: Backbone, world_size: int, machine: Machine) -> Iterator[str]:
    if any(size < 1 for size in _divisors_of_the_layout(run)):
        return  # number_problems has said so, and every rule below divides by them
    yield from parallel_problems(run, backbone, world_size)
    yield from expert_problems(run, backbone, machine)
    yield from vision_expert_problems(run)
    yield from length_problems(run, backbone)
    yield from batch_problems(run, world_size)
    yield from training_problems(run, machine)
    yield from muon_layout_problems(run, world_size)
    yield from profile_problems(run, world_size)
    yield from tracker_problems(run)


def _divisors_of_the_layout(run: RunConfig) -> Iterable[int]:
    parallel, training = run.parallel, run.training
    yield parallel.tensor_model_parallel_size
    yield parallel.pipeline_model_parallel_size
    yield parallel.virtual_pipeline_model_parallel_size or 1
    yield parallel.context_parallel_size
    yield parallel.expert_model_parallel_size
    yield parallel.expert_tensor_parallel_size or 1
    yield from (training.micro_batch_size, training.global_batch_size)


def _found(look_up: Callable, problems: list[str]):
    """What `look_up` finds; None and a problem more where it raises."""
    try:
        return look_up()
    except MoELlavaError as error:
        problems.append(str(error))
        return None
