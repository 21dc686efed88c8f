"""Zeros that a class of transformers insists on and the model has not: biases, rows for `<image>`, shared experts."""

import math
from dataclasses import replace

from megatron_moellava.conversion import huggingface
from megatron_moellava.conversion.initial import language_dtype, zeros
from megatron_moellava.conversion.layout import (
    Layout,
    outside_name,
)
from megatron_moellava.conversion.megatron_checkpoint import Checkpoint
from megatron_moellava.conversion.recipes import Part, Recipe, identity
from megatron_moellava.conversion.served_tokenizer import ServedTokenizer
from megatron_moellava.conversion.tensors import Tensor
from megatron_moellava.costs.shapes import LANGUAGE, Model, megatron_tensors


def missing_biases(model: Model, source: Checkpoint) -> dict[str, Tensor]:
    """Zeros for the biases that the target family has and the model has not."""
    dtype = language_dtype(source.tensors)
    return {
        name: zeros(shape, dtype)
        for name, shape in megatron_tensors(model).items()
        if name.endswith("linear_qkv.bias") and name not in source.tensors
    }


def image_token_of(source: Checkpoint, model: Model, served: ServedTokenizer | None) -> tuple[int, int]:
    """(rows of the vocabulary, id of <image>). The id needs a row of its own; it is the first that the tokenizer lacks.

    Without a tokenizer it is the one that the model was imported with. Rows are added, in steps of 64 as transformers' own
    LLaVA has them, when the published vocabulary is full.
    """
    vocab, config = model.backbone.vocab_size, source.run.provenance.get("hf_config") or {}
    known = config.get("image_token_index", config.get("image_token_id"))
    imported = known if isinstance(known, int) and 0 <= known < vocab else vocab
    token = served.image_token if served else imported
    return (vocab, token) if token < vocab else (token // 64 * 64 + 64, token)


def with_vocabulary(
    recipes: list[Recipe], tensors: dict[str, Tensor], model: Model, vocab: int
) -> tuple[list[Recipe], dict[str, Tensor]]:
    """Embedding and output rows of zeros up to `vocab`; generation_config forbids their ids."""
    added = vocab - model.backbone.vocab_size
    if not added:
        return recipes, tensors
    keys = [
        f"{LANGUAGE}{name}" for name in ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")
    ]
    grown = []
    for recipe in recipes:
        if recipe.parts[0].source in keys:
            extra = (added, *recipe.shape[1:])
            name = f"{recipe.name} (added rows)"
            tensors = tensors | {name: zeros(extra, tensors[recipe.parts[0].source].dtype)}
            parts = (*recipe.parts, Part(name, 0, math.prod(extra)))
            recipe = replace(recipe, shape=(vocab, *recipe.shape[1:]), parts=parts)
        grown.append(recipe)
    return grown, tensors


def with_empty_experts(
    recipes: list[Recipe], tensors: dict[str, Tensor], model: Model, layout: Layout, dtype: str | None
) -> tuple[list[Recipe], dict[str, Tensor]]:
    """The shared experts that Qwen2-MoE insists on, as zeros."""
    shapes, kind = huggingface.empty_shared_experts(model), dtype or language_dtype(tensors)
    empty = {outside_name(name, LANGUAGE, layout, model): zeros(shape, kind) for name, shape in shapes.items()}
    return recipes + [identity(name, tensor) for name, tensor in empty.items()], tensors | empty
