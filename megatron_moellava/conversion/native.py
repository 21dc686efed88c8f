"""transformers' LFM2-VL: the class there whose tower is SigLIP 2 NaFlex, over any language model that it knows.

A model with a tower at native resolution is exported as it and read from it. Its projector's `downsample_factor` is our pixel
shuffle; its features are those after the tower's last norm, as `towers/siglip2.py` has them.
"""

from dataclasses import replace

from megatron_moellava.config import ConfigError
from megatron_moellava.conversion.asked_as import asked_as
from megatron_moellava.conversion.huggingface import needs_modelling_file, text_config
from megatron_moellava.costs.shapes import Model
from megatron_moellava.towers import PROJECTORS, Tower
from megatron_moellava.towers.from_config import hf_config_of

MODEL_TYPE = "lfm2_vl"
# Keys of the projector that this program supports in one way only.
PROJECTOR = {"projector_hidden_act": "gelu", "projector_bias": True, "projector_use_layernorm": False}


def native_config(model: Model, vocab_size: int, image_token: int, trained: dict[str, dict], has_head: bool) -> dict:
    """`config.json` of the export; `has_head`: the tower's pooling head rides along, which no feature needs.

    `trained`: what it was trained with (`checkpoint.description.trained_with`). ConfigError for what the class cannot
    compute.
    """
    backbone, tower = model.backbone, model.required_tower
    reason = needs_modelling_file(model)
    if reason:
        raise ConfigError(
            f"--layout transformers: {reason}, and there is no modelling file for towers at native resolution "
            f"({tower.name}); export --layout language-model and --layout tower"
        )
    scales = trained.get("model", {}).get("scale_multimodal_embeddings", True)
    said = asked_as(model, trained, {})
    return {
        "architectures": ["Lfm2VlForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "text_config": text_config(model, vocab_size, scales),
        "vision_config": hf_config_of(tower) | {"vision_use_head": has_head},
        "image_token_id": image_token,
        "downsample_factor": tower.shuffle,
        "projector_hidden_size": backbone.hidden_size,
        **PROJECTOR,
        "tie_word_embeddings": backbone.share_embeddings_and_output_weights,
        **({"trained_with": {"data": said}} if said else {}),
    }


def tower_with_projector(tower: Tower, config: dict) -> Tower:
    """The tower with the projector of the config's `downsample_factor`. ConfigError for another kind of projector."""
    found = {"projector_hidden_act": "gelu", "projector_bias": True, "projector_use_layernorm": True} | config
    problems = [
        f"  {key}={found[key]!r}: only {value!r} is supported"
        for key, value in PROJECTOR.items()
        if found[key] != value
    ]
    factor, kinds = config.get("downsample_factor", 2), {kind.shuffle: kind.name for kind in PROJECTORS.values()}
    if factor not in kinds:
        problems.append(f"  downsample_factor={factor!r}: supported are {', '.join(map(str, kinds))}")
    inner, width = config.get("projector_hidden_size"), (config.get("text_config") or {}).get("hidden_size")
    if inner != width:
        problems.append(f"  projector_hidden_size={inner!r}: only the language model's {width!r} is supported")
    if problems:
        raise ConfigError("the source's projector is not supported:\n" + "\n".join(problems))
    return replace(tower, projector=kinds[factor])
