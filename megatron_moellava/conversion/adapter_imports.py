"""An adapter of `peft`, trained here or elsewhere -> an adapter checkpoint beside its base."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from megatron_moellava.checkpoint.base import name_of_base
from megatron_moellava.checkpoint.sums import verify_sums
from megatron_moellava.config import CheckpointError, ConfigError, LoraConfig, LoraTarget
from megatron_moellava.conversion import fused_experts, huggingface
from megatron_moellava.conversion.adapters import CONFIG_FILE, PEFT, WEIGHTS, Line, fused_matrices, fused_names, lines
from megatron_moellava.conversion.initial import language_dtype, zeros
from megatron_moellava.conversion.layout import LANGUAGE_MODEL, LLAVA, ORIGINAL, OWN, TRANSFORMERS, Layout, entries
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint, write_checkpoint
from megatron_moellava.conversion.modality import check_no_branches
from megatron_moellava.conversion.readers import open_bin, open_safetensors
from megatron_moellava.conversion.recipes import Part, Recipe, check, import_recipes
from megatron_moellava.conversion.tensors import Tensor
from megatron_moellava.conversion.writers import Progress
from megatron_moellava.costs.adapters import PREFIX, adapted_matrices, adapter_tensors
from megatron_moellava.costs.shapes import Model
from megatron_moellava.hf_config import read_json
from megatron_moellava.stages import TARGETS

BESIDE = "non_lora_trainables.bin"  # LLaVA's scripts write what they train whole into it
# Where peft may have found the modules: transformers of today, of version 4, the language model alone, the originals.
IMPORT_LAYOUTS = (OWN, TRANSFORMERS, LANGUAGE_MODEL, LLAVA, ORIGINAL)
# Settings of peft that make another function of the same tensors: {name: what it is without them}.
PLAIN: dict[str, object] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def import_adapter(
    source: Path,
    *,
    base: Path,
    save: Path,
    verify: bool = True,
    progress: Progress = lambda count: None,
    begin: Callable[[int], object] = lambda total: None,
) -> dict:
    """An adapter of `peft` -> an adapter checkpoint beside `base`. What it leaves out of a role's matrices stays zero.

    Raises ConfigError or CheckpointError that list every problem, before anything is written.
    """
    source = Path(source)
    verify_sums(source, verify=verify)
    config = read_peft_config(source)
    under = open_checkpoint(base, verify=verify)
    tensors = _opened(source)
    check_no_branches(under.model, "the model that peft has adapted")
    layout, lora = _recognised(source, tensors, under.model, config)
    model = _named_model(under.model, layout)
    found = lines(model, lora, layout)
    fused = fused_matrices(model, lora) if layout is OWN else []
    for adapted, spelled in fused:
        own = dict(fused_experts.imported(adapted, lora, spelled, tensors, PEFT))
        tensors = own | {name: tensor for name, tensor in tensors.items() if name not in fused_names(adapted, spelled)}
    names = {name for entry in entries(model, layout) for name in entry.names}
    whole = [entry for entry in entries(model, layout) if names & tensors.keys() and set(entry.names) <= tensors.keys()]
    recipes = [
        *_adapter_recipes(found, lora, model, tensors, language_dtype(under.tensors)),
        *import_recipes(whole, tensors),
    ]
    expected = {line.name: line.shape for line in found} | {
        name: tensor.shape for name, tensor in adapter_tensors(model, lora).items() if name in tensors
    }
    check(recipes, tensors, what=f"{source} (peft)", expected=expected)
    begin(sum(recipe.nbytes for recipe in recipes))
    folder = write_checkpoint(
        save,
        under.model,
        recipes,
        tensors,
        stage=under.run.stage or 0,
        provenance={"operation": "import", "layout": "peft", "source": source.name, "parent": under.run.provenance},
        progress=progress,
        adapter={"lora": asdict(lora), "base": name_of_base(under.folder)},
    )
    return {"folder": str(folder), "tensors": len(recipes), "lora": lora, "layout": layout.title}


def read_peft_config(folder: Path) -> dict:
    """`adapter_config.json`; ConfigError that lists what our adapters cannot say."""
    if not (folder / CONFIG_FILE).exists():
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}: it is no adapter of peft; give the folder that has one")
    config = read_json(folder / CONFIG_FILE)
    config = config | _without_patterns(config)
    beyond = [f"{name}={config[name]!r}" for name, plain in PLAIN.items() if (config.get(name) or plain) != plain]
    if beyond:
        raise ConfigError(
            f"{folder / CONFIG_FILE}: {', '.join(beyond)}: only plain LoRA of one rank is read; merge it with peft "
            "(merge_and_unload), and import the result"
        )
    return config


def _without_patterns(config: dict) -> dict:
    """Twice the rank for gate and up in one tensor is an adapter of one rank for each."""
    lora = LoraConfig(rank=config.get("r") or 1, alpha=float(config.get("lora_alpha") or 1.0))
    wanted = fused_experts.patterns(lora)
    return {"rank_pattern": {}, "alpha_pattern": {}} if all(config.get(name) == wanted[name] for name in wanted) else {}


def _opened(folder: Path) -> dict[str, Tensor]:
    """The tensors, without peft's prefix where they were trained whole."""
    file = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if file is None:
        raise CheckpointError(f"{folder} holds neither of {', '.join(WEIGHTS)}; download it again")
    tensors = open_safetensors(file) if file.suffix == ".safetensors" else open_bin(file)
    if (folder / BESIDE).exists():
        tensors |= open_bin(folder / BESIDE)
    return {name if ".lora_" in name else name.removeprefix(PEFT): tensor for name, tensor in tensors.items()}


def _named_model(model: Model, layout: Layout) -> Model:
    """The part of a model that a layout has names for."""
    if layout is OWN:
        return huggingface.as_transformers(model)
    return model if layout.tower else replace(model, tower=None)


def _recognised(source: Path, tensors: dict[str, Tensor], model: Model, config: dict) -> tuple[Layout, LoraConfig]:
    """The layout whose modules are all that the adapter names, and the settings of the adapter."""
    every = LoraConfig(rank=config["r"], targets=tuple(TARGETS))
    unknown: list[set[str]] = []
    for layout in IMPORT_LAYOUTS:
        if model.moe and not layout.expert:
            continue
        own = _named_model(model, layout)
        roles = {adapted.name: adapted.role for adapted in adapted_matrices(own, every)}
        places = {line.name: line.part.source for line in lines(own, every, layout)}
        named = fused_matrices(own, every) if layout is OWN else []
        fused = {name for adapted, names in named for name in fused_names(adapted, names)}
        known = places.keys() | fused | {name for entry in entries(own, layout) for name in entry.names}
        unknown.append(tensors.keys() - known)
        if not unknown[-1]:
            used = {roles[places[name].removeprefix(PREFIX).rpartition(".")[0]] for name in tensors if name in places}
            used |= {"experts"} if fused & tensors.keys() else set()
            targets: tuple[LoraTarget, ...] = tuple(target for target, role in TARGETS.items() if role in used)
            return layout, LoraConfig(
                rank=config["r"],
                alpha=float(config["lora_alpha"]),
                dropout=float(config.get("lora_dropout") or 0.0),
                use_rslora=bool(config.get("use_rslora")),
                targets=targets,
            )
    left = min(map(sorted, unknown), key=len)
    raise CheckpointError(
        f"{source} does not fit {model.backbone.name}: {len(left)} of its {len(tensors)} tensors belong to no module of it, "
        f"among them {', '.join(left[:3])}; give the base that it was trained on"
    )


def _adapter_recipes(
    found: list[Line], lora: LoraConfig, model: Model, tensors: dict[str, Tensor], dtype: str
) -> Iterator[Recipe]:
    """Ours from peft's, in the order of our elements; modules without an adapter have zeros, which stay so."""
    parts: dict[str, list[tuple[int, Part]]] = {
        name: [(0, Part(name, 0, tensor.numel))] for name, tensor in tensors.items() if name.startswith(PREFIX)
    }
    dtype = next((tensor.dtype for name, tensor in tensors.items() if ".lora_" in name), dtype)
    for line in found:
        if line.name not in tensors:
            tensors[line.name] = zeros(line.shape, dtype)
        whole = Part(line.name, 0, math.prod(line.shape))
        parts.setdefault(line.part.source, []).append((line.part.start, whole))
    for name, tensor in adapter_tensors(model, lora).items():
        ordered = tuple(part for _, part in sorted(parts[name], key=lambda item: item[0]))
        yield Recipe(name, tensor.shape, dtype, ordered)
