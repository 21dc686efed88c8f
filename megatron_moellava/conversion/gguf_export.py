"""A Megatron checkpoint -> GGUF for llama.cpp: `model.gguf`, the language model, and `mmproj.gguf`, tower and projector.

Tensor names, types and quantisation are the `gguf` package's. One tensor is in memory at a time. llama.cpp has experts in
every layer or in none, so a dense layer of a MoE model becomes as many equal experts: the same function, more bytes.
"""

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_moellava.checkpoint.description import trained_with
from megatron_moellava.checkpoint.integrity import file_digests
from megatron_moellava.config import ConfigError
from megatron_moellava.conversion import for_generation, huggingface
from megatron_moellava.conversion.chat_template import chat_template
from megatron_moellava.conversion.gguf_metadata import describe_text, describe_tower, describe_vocabulary
from megatron_moellava.conversion.initial import zeros
from megatron_moellava.conversion.layout import TRANSFORMERS, entries
from megatron_moellava.conversion.megatron_checkpoint import Checkpoint
from megatron_moellava.conversion.recipes import Recipe, export_recipes, identity, made
from megatron_moellava.conversion.served_tokenizer import served_tokenizer
from megatron_moellava.conversion.tensors import Tensor
from megatron_moellava.conversion.writers import Progress
from megatron_moellava.costs.shapes import Model, expert_ffn_hidden_size

PACKAGE = "gguf"
MODEL_FILE, TOWER_FILE = "model.gguf", "mmproj.gguf"
# Family of the text model (as transformers names it), with experts or not -> llama.cpp's architecture. Where it rotates
# neighbouring channels, the rows of q and k are put in that order.
ARCHITECTURES = {
    ("llama", False): "llama",
    ("llama", True): "llama",
    ("mistral", False): "llama",
    ("mistral", True): "llama",
    ("qwen2", False): "qwen2",
    ("qwen2", True): "llama",
    ("qwen3", False): "qwen3",
    ("qwen3", True): "qwen3moe",
    ("phi", False): "phi2",
    ("stablelm", False): "stablelm",
}
NEIGHBOURS = "llama"
VISION = "vision_tower.vision_model."
PROJECTOR = {"multi_modal_projector.linear_1.": "mm.0.", "multi_modal_projector.linear_2.": "mm.2."}


@dataclass(frozen=True, slots=True)
class Part:
    """A file's tensors: a name in GGUF and what makes it, in order."""

    recipes: list[tuple[str, Recipe]]
    tensors: dict[str, Tensor]
    rotated: dict[str, int]  # of those whose rows change places: attention heads


def check_gguf(source: Checkpoint, tokenizer: Path | None) -> None:
    """ConfigError for what llama.cpp has no architecture for, before anything is written."""
    model = _renamed(source.model)
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError("--layout gguf needs the package gguf; pip install 'megatron-moellava[gguf]'")
    if tokenizer is None:
        raise ConfigError("--layout gguf holds the tokenizer too; give --tokenizer, the folder of the language model's")
    reason = huggingface.needs_modelling_file(source.model)
    family, tower = model.backbone.hf.family, source.model.tower
    if reason == "the output layer has a bias":  # phi2 has one there
        reason = ""
    if (family, model.moe is not None) not in ARCHITECTURES:
        reason = reason or f"llama.cpp has no {family}{' with experts' if model.moe else ''} of this kind"
    if model.moe and model.moe.moe_router_topk == 1:
        reason = reason or "llama.cpp weights a single expert by 1"
    if model.moe and model.moe.moe_router_pre_softmax:
        reason = reason or "llama.cpp divides the weights of several experts by their sum"
    if model.backbone.rope_scaling:
        reason = reason or "this export knows no rotary scaling"
    some = model.moe and len(source.model.moe_layers) < model.backbone.num_layers
    if some and expert_ffn_hidden_size(source.model.required_moe, model.backbone) != model.backbone.ffn_hidden_size:
        reason = reason or "its layers without experts have another width than the experts, and llama.cpp has one width"
    if trained_with(source.run).get("data", {}).get("image_grid") or (tower and tower.newline):
        reason = reason or "tiled pictures"
    if tower and (tower.native or tower.shuffle > 1):
        reason = reason or f"{tower.name} has native resolution or a pixel shuffle"
    if tower and tower.takes_videos:
        reason = reason or f"{tower.name} attends across the frames of a video"
    if tower and tower.drop_first_feature != tower.class_token:
        reason = reason or f"llama.cpp drops a tower's class token and no other feature, unlike {tower.name}"
    if reason:
        raise ConfigError(f"--layout gguf: {reason}; export --layout transformers")


def gguf_notes(source: Checkpoint) -> list[str]:
    """What llama.cpp computes otherwise with files that are right."""
    if not (source.model.tower and source.model.tower.class_token):
        return []
    return [
        "llama.cpp since May 2025 (its issue 25814) puts the class token behind the patches and drops the first patch instead, "
        "which shifts what this tower sees by a patch; towers without a class token (SigLIP) are not concerned"
    ]


def _renamed(model: Model) -> Model:
    """Qwen v1 under Qwen2's names; all others have names that the `gguf` package knows."""
    return huggingface.as_transformers(replace(model, moe=None)) if model.backbone.hf.export_as else model


def write_gguf(source: Checkpoint, folder: Path, *, kind: str, tokenizer: Path, progress: Progress) -> dict[str, str]:
    """Both files into `folder`; {file: SHA-256}. `kind`: one of FILE_TYPES, of all matrices of the language model."""
    from gguf import GGUFWriter

    model = replace(_renamed(source.model), moe=source.model.moe)
    arch = ARCHITECTURES[model.backbone.hf.family, model.moe is not None]
    served = served_tokenizer(tokenizer, with_image=False)
    template = for_generation.template_of(source.model, trained_with(source.run))
    writer = GGUFWriter(folder / MODEL_FILE, arch)
    describe_text(writer, model, expert_ffn_hidden_size(model.moe, model.backbone) if model.moe else 0, kind)
    describe_vocabulary(writer, served, tokenizer, model.backbone, chat_template(template, served, llama_cpp=True))
    _write(writer, _text(source, model, arch), kind, progress)
    names = [MODEL_FILE]
    if model.tower:
        writer = GGUFWriter(folder / TOWER_FILE, "clip")
        precise = "f32" if kind == "f32" else "f16"
        describe_tower(writer, model.tower, model.backbone.hidden_size, precise)
        _write(writer, _vision(source, model), precise, progress)
        names.append(TOWER_FILE)
    return file_digests(folder, names)


def _text(source: Checkpoint, model: Model, arch: str) -> Part:
    import gguf

    names = gguf.get_tensor_name_map(_arch(arch), model.backbone.num_layers)
    text = replace(model, tower=None)
    recipes = {recipe.name: recipe for recipe in export_recipes(entries(text, TRANSFORMERS), source.tensors)}
    recipes = {name.removeprefix(TRANSFORMERS.language): recipe for name, recipe in recipes.items()}
    tensors = dict(source.tensors)
    if model.moe:
        recipes, tensors = _experts_everywhere(recipes, model, tensors)
    if arch == "phi2" and "lm_head.bias" not in recipes:
        name, shape = "lm_head.bias", (model.backbone.vocab_size,)
        tensors[name] = zeros(shape, "float32")
        recipes[name] = identity(name, tensors[name])
    found, rotated = [], {}
    for name, recipe in recipes.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target, f"gguf has no name for {name} in {arch}"
        found.append((target, recipe))
        for part, heads in (("q", model.backbone.num_attention_heads), ("k", model.backbone.num_query_groups)):
            if arch == NEIGHBOURS and f".{part}_proj." in name:
                rotated[target] = heads
    return Part(found, tensors, rotated)


def _experts_everywhere(
    recipes: dict[str, Recipe], model: Model, tensors: dict[str, Tensor]
) -> tuple[dict[str, Recipe], dict[str, Tensor]]:
    """One tensor for all experts of a layer; the MLP of a dense layer as many times, behind a router of zeros."""
    count, hidden = model.required_moe.num_moe_experts, model.backbone.hidden_size
    kept = {name: recipe for name, recipe in recipes.items() if ".mlp." not in name or ".mlp.gate." in name}
    for layer in range(model.backbone.num_layers):
        root = f"model.layers.{layer}.mlp."
        for part in ("gate_proj", "up_proj", "down_proj"):
            if layer in model.moe_layers:
                own = [recipes[f"{root}experts.{expert}.{part}.weight"] for expert in range(count)]
            else:
                own = [recipes[f"{root}{part}.weight"]] * count
            parts = tuple(piece for recipe in own for piece in recipe.parts)
            name = f"{root}experts.{part}.weight"
            kept[name] = replace(own[0], name=name, shape=(count, *own[0].shape), parts=parts)
        if layer not in model.moe_layers:
            name = f"{root}gate.weight"
            tensors = tensors | {name: zeros((count, hidden), "float32")}
            kept[name] = identity(name, tensors[name])
    return kept, tensors


def _vision(source: Checkpoint, model: Model) -> Part:
    import gguf

    tower = model.required_tower
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, tower.num_used_layers)
    found = []
    for recipe in export_recipes(entries(model, TRANSFORMERS), source.tensors):
        for prefix, short in PROJECTOR.items():
            if recipe.name.startswith(prefix):
                found.append((short + recipe.name.removeprefix(prefix), recipe))
        if recipe.name.startswith(VISION):
            target = names.get_name(recipe.name, try_suffixes=(".weight", ".bias"))
            assert target, f"gguf has no name for {recipe.name}"
            found.append((target, recipe))
    return Part(found, dict(source.tensors), {})


def _arch(name: str):
    import gguf

    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _write(writer, part: Part, kind: str, progress: Progress) -> None:
    """Header and list first, then the tensors, one by one."""
    import gguf
    import numpy as np

    types = gguf.GGMLQuantizationType
    storage: dict = {types.F32: np.dtype("float32"), types.F16: np.dtype("float16"), types.Q8_0: np.dtype("uint8")}
    kinds = [_kind(name, recipe, kind) for name, recipe in part.recipes]
    for (name, recipe), own in zip(part.recipes, kinds, strict=True):
        shape = gguf.quant_shape_to_byte_shape(recipe.shape, own) if own == types.Q8_0 else recipe.shape
        size = math.prod(shape) * storage[own].itemsize
        writer.add_tensor_info(name, shape, storage[own], size, raw_dtype=own if own == types.Q8_0 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (_, recipe), own, values in zip(part.recipes, kinds, _values(part), strict=True):
        writer.write_tensor_data(gguf.quantize(values, own))
        progress(recipe.nbytes)
    writer.close()


def _values(part: Part) -> Iterator:
    """fp32 arrays, rows of q and k in the order of neighbouring channels where that is wanted."""
    for name, recipe in part.recipes:
        values = made(recipe, part.tensors).float().numpy()
        if name in part.rotated:
            heads, shape = part.rotated[name], values.shape
            values = values.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(shape)
        yield values


def _kind(name: str, recipe: Recipe, kind: str):
    """Vectors, routers and positions stay in fp32; Q8_0 needs rows of a multiple of 32."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if len(recipe.shape) < 2 or "ffn_gate_inp" in name or "position_embd" in name or kind == "f32":
        return kinds.F32
    return kinds.Q8_0 if kind == "q8_0" and recipe.shape[-1] % 32 == 0 else kinds.F16
