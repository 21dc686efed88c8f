"""Low-rank adapters: what they need of the stage, of the model, and of the checkpoint that they stand beside."""

from collections.abc import Iterator

from megatron_moellava.backbones import Backbone
from megatron_moellava.checkpoint.base import SEAL_FIRST
from megatron_moellava.checkpoint.description import RunDescription
from megatron_moellava.config import LoraConfig, RunConfig, from_dict
from megatron_moellava.costs.adapters import targets_without_a_matrix
from megatron_moellava.costs.shapes import model_of_run
from megatron_moellava.stages import TARGETS, adapted_roles
from megatron_moellava.towers import Tower

MERGE = "merge it first: moellava convert merge"
SAME = ("rank", "alpha", "use_rslora", "shared_outer")  # besides the targets: what makes the function of an adapter


def adapter_problems(run: RunConfig, backbone: Backbone, tower: Tower) -> Iterator[str]:
    """Of `training.lora`, without looking at files."""
    lora, training = run.training.lora, run.training
    if lora is None:
        return
    if training.stage == 1:
        yield "training.lora: stage 1 trains a new projector whole, and nothing else; leave lora out, or use stage 2 or 3"
    if lora.targets == ():
        yield f"training.lora.targets is empty, so nothing would be adapted; name some of {', '.join(TARGETS)}"
    missing = targets_without_a_matrix(model_of_run(run, backbone, tower), lora)
    if missing:
        yield (
            f"training.lora.targets: this model has no matrices of {', '.join(missing)} (a dense model has no experts and no "
            "router, one with experts in every layer no ffn); leave them out"
        )
    twice = [role for role in training.trains or () if role in adapted_roles(lora)]
    if twice:
        yield (
            f"training.trains names {', '.join(twice)}, whose matrices training.lora.targets adapts: a matrix is either "
            "trained or adapted; drop one of the two"
        )
    if lora.shared_outer and (run.moe is None or "experts" not in adapted_roles(lora)):
        yield "training.lora.shared_outer=true is about the experts' adapters, and experts have none here; leave it out"


def base_problems(given: str, description: RunDescription, run: RunConfig) -> Iterator[str]:
    """Of the checkpoint that a run starts from; `given`: how the user named it."""
    lora = run.training.lora
    if description.adapter is None:
        if lora is not None and description.checksum is None:
            yield f"{given} has no seal by which an adapter could name its base; {SEAL_FIRST}"
        return
    stored = from_dict(LoraConfig, description.adapter["lora"])
    if lora is None:
        yield f"{given} is an adapter, and training.lora is not set; set it as there ({shown(stored)}), or {MERGE}"
    elif shown(lora) != shown(stored):
        yield f"{given} is an adapter of training.lora {shown(stored)}, and this run asks for {shown(lora)}; or {MERGE}"


def shown(lora: LoraConfig) -> str:
    """What makes the function of an adapter, as a user would write it."""
    targets = ",".join(sorted(target for target, role in TARGETS.items() if role in adapted_roles(lora)))
    return " ".join([*(f"{name}={getattr(lora, name)}" for name in SAME), f"targets=[{targets}]"])
