"""transformers' side: configs of LlavaForConditionalGeneration, dense and MoE, and which model needs a modelling file.

Qwen2-MoE (Qwen3-MoE with QK norm) with `norm_topk_prob`, `mlp_only_layers` and no shared expert computes exactly what a
deterministic MoE-LLaVA computes on RMSNorm + SwiGLU backbones. Everything else goes with `modeling_moe_llava.py`.
"""

from dataclasses import replace

from megatron_moellava.backbones import FAMILIES, Backbone
from megatron_moellava.backbones.experts import sums_to_one
from megatron_moellava.backbones.from_config import backbone_from_hf_config, hf_config_of
from megatron_moellava.config import ConfigError, MoEConfig
from megatron_moellava.conversion.asked_as import asked_as
from megatron_moellava.costs.shapes import Model, expert_ffn_hidden_size
from megatron_moellava.mapping import Shape
from megatron_moellava.routers import experts_by_group
from megatron_moellava.towers.from_config import hf_config_of as tower_config

# Width of the shared expert that transformers' Qwen2-MoE always has: of zeros here. With a width of 0 transformers reports
# its weights as missing, and vLLM refuses weights of that size.
EMPTY_SHARED_EXPERT = 16
NO_SHARED_EXPERT = "there must be no shared expert: MoE-LLaVA has none of that kind"
OWN_TYPE = "moe_llava"  # of modeling_moe_llava.py
MOE_TYPES = {"qwen2_moe": "qwen2", "qwen3_moe": "qwen3"}
# Keys of a MoE text config that `moe_config` reads, or that have no meaning for these models.
MOE_KEYS = (
    "num_experts",
    "num_experts_per_tok",
    "decoder_sparse_step",
    "mlp_only_layers",
    "norm_topk_prob",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "router_aux_loss_coef",
    "output_router_logits",
    "qkv_bias",
    "num_local_experts",
)


# The classes that put tiles together, by Tower.tiling.
NEWLINE_CLASSES: dict[str, dict] = {
    "next": {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"},
    "onevision": {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "vision_aspect_ratio": "anyres_max_9",
    },
}


def text_backbone(config: dict, name: str) -> Backbone:
    """The backbone of a language model's config, or of the text part of a vision-language model's."""
    text = dict(config.get("text_config") or config)
    if not isinstance(text.get("model_type"), str | None):
        raise ConfigError(f"model_type={text['model_type']!r} of {name} must be a name such as 'llama'")
    if _is_upcycled(config):
        text["model_type"] = MOE_TYPES[text["model_type"]]
        text = {key: value for key, value in text.items() if key not in MOE_KEYS}
    if "tie_word_embeddings" not in text and "text_config" in config:
        text["tie_word_embeddings"] = config.get("tie_word_embeddings", False)
    return backbone_from_hf_config(text, FAMILIES, name=name)


def _is_upcycled(config: dict) -> bool:
    """Whether it is a vision-language model with experts such as this program exports on families without experts of their
    own: no shared expert, and weights that sum to 1."""
    text = config.get("text_config") or {}
    shared = text.get("shared_expert_intermediate_size") or 0
    if text.get("model_type") not in MOE_TYPES or shared not in (0, EMPTY_SHARED_EXPERT):
        return False
    return text.get("num_experts_per_tok") == 1 or bool(text.get("norm_topk_prob"))


def moe_config(config: dict, backbone: Backbone) -> MoEConfig | None:
    """The experts of a model whose config is transformers': of a family that has some, or upcycled ones."""
    if not _is_upcycled(config):
        return backbone.moe
    text = config["text_config"]
    layers = range(text["num_hidden_layers"])
    step, dense = text.get("decoder_sparse_step", 1), text.get("mlp_only_layers") or []
    placement = tuple(i for i in layers if i not in dense and (i + 1) % step == 0)
    topk, width = text["num_experts_per_tok"], text["moe_intermediate_size"]
    return MoEConfig(
        num_moe_experts=text["num_experts"],
        moe_router_topk=topk,
        placement=placement,
        moe_ffn_hidden_size=width if width != text["intermediate_size"] else None,
        normalize_top1=topk == 1 and text.get("norm_topk_prob", False),
    )


def needs_modelling_file(model: Model) -> str:
    """Why stock transformers cannot run the model; empty when it can."""
    backbone, moe = model.backbone, model.moe
    if any(getattr(backbone, name) != 1 for name in ("logits_divisor", "residual_multiplier", "embedding_multiplier")):
        return f"{backbone.hf.family} scales embeddings, residual branches and logits"
    if backbone.output_layer_bias:
        return "the output layer has a bias"
    if backbone.hf.experts is not None:
        return needs_modelling_file(_renamed(model)) if backbone.hf.export_as else ""
    if moe and not backbone.hf.moe_model_type:
        return f"transformers has no {backbone.hf.family} with experts"
    if moe and moe.use_residual:
        return "transformers has no residual MoE"
    if moe and moe.expert_groups:
        return "transformers has no experts by modality"
    if moe and moe.moe_shared_expert_intermediate_size:
        return "transformers has no such shared expert"
    if moe and moe.moe_router_topk_scaling_factor:
        return "transformers has no such model whose experts' weights are scaled"
    if moe and moe.moe_router_enable_expert_bias:
        return "transformers has no such model whose router has expert biases"
    return ""


def as_transformers(model: Model) -> Model:
    """The same model under the family whose names transformers knows, with the biases that it insists on.

    Qwen v1 becomes Qwen2, DeepSeekMoE Llama with experts; a MoE on Llama or Mistral becomes Qwen2-MoE, with zero q, k and v
    biases.
    """
    backbone = model.backbone
    if backbone.hf.experts is not None:
        return as_transformers(_renamed(model)) if backbone.hf.export_as else model
    stock_moe = model.moe and not needs_modelling_file(model)
    family = MOE_TYPES[backbone.hf.moe_model_type] if stock_moe else backbone.hf.export_as
    if not family:
        return model
    target = _size_of(family)
    bias = target.add_qkv_bias if stock_moe else backbone.add_qkv_bias
    return replace(model, backbone=replace(backbone, hf=target.hf, mapping=target.mapping, add_qkv_bias=bias))


def _renamed(model: Model) -> Model:
    """A model with experts of its own as one of the dense family that its layers are, with these experts."""
    target = _size_of(model.backbone.hf.export_as)
    return replace(model, backbone=replace(model.backbone, hf=target.hf, mapping=target.mapping, moe=None))


def _size_of(family: str) -> Backbone:
    return next(item.SIZES[0] for item in FAMILIES if item.SIZES[0].hf.family == family)


def export_config(model: Model, vocab_size: int, image_token: int, trained: dict[str, dict]) -> dict:
    """`config.json` of the export; `model` as `as_transformers` gives it.

    `trained`: what it was trained with (`checkpoint.description.trained_with`).
    """
    scales = trained.get("model", {}).get("scale_multimodal_embeddings", True)
    backbone, tower = model.backbone, model.required_tower
    reason = needs_modelling_file(model)
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text_config(model, vocab_size, scales),
        "vision_config": tower_config(tower),
        "image_token_index": image_token,
        "image_token_id": image_token,
        "image_seq_length": tower.num_features,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": tower.feature_layer,
        "vision_feature_select_strategy": "default" if tower.drop_first_feature else "full",
        "tie_word_embeddings": backbone.share_embeddings_and_output_weights,
    }
    if tower.newline:
        config |= NEWLINE_CLASSES[tower.tiling] | {"image_grid_pinpoints": tower.tiles.pinpoints(tower.image_size)}
    if said := asked_as(model, trained, {}):
        config["trained_with"] = {"data": said}
    return config | own_config(model, scales) if reason else config


def text_config(model: Model, vocab_size: int, scales: bool) -> dict:
    """`text_config` of an export: the backbone's fields, with those of scalings and experts."""
    text = hf_config_of(model.backbone) | {"vocab_size": vocab_size}
    if model.backbone.hf.family == "minicpm":  # Granite is Llama with MiniCPM's scalings
        text |= {
            "model_type": "granite",
            "architectures": ["GraniteForCausalLM"],
            "residual_multiplier": model.backbone.residual_multiplier,
            "attention_multiplier": model.backbone.kv_channels**-0.5,
            "embedding_multiplier": model.backbone.embedding_multiplier if scales else 1.0,
            "logits_scaling": 1.0,  # the wrapper divides
        }
    if model.moe and model.backbone.hf.experts is None and not needs_modelling_file(model):
        text |= _moe_text(model)
    return text


def _moe_text(model: Model) -> dict:
    moe, backbone = model.required_moe, model.backbone
    kind = {family: kind for kind, family in MOE_TYPES.items()}[backbone.hf.family]
    name = kind.replace("qwen", "Qwen").replace("_moe", "Moe")
    return {
        "model_type": kind,
        "architectures": [f"{name}ForCausalLM"],
        "num_experts": moe.num_moe_experts,
        "num_experts_per_tok": moe.moe_router_topk,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(backbone.num_layers) if i not in model.moe_layers],
        "norm_topk_prob": sums_to_one(moe),
        "moe_intermediate_size": expert_ffn_hidden_size(moe, backbone),
        "router_aux_loss_coef": moe.moe_aux_loss_coeff,
    } | ({"shared_expert_intermediate_size": EMPTY_SHARED_EXPERT, "qkv_bias": True} if kind == "qwen2_moe" else {})


def empty_shared_experts(model: Model) -> dict[str, Shape]:
    """Names, below the text model's, and shapes of the zeros that Qwen2-MoE wants; `model` as `as_transformers` gives it."""
    if model.moe is None or needs_modelling_file(model) or model.backbone.hf.moe_model_type != "qwen2_moe":
        return {}
    hidden, width = model.backbone.hidden_size, EMPTY_SHARED_EXPERT
    shapes = {
        "shared_expert.gate_proj.weight": (width, hidden),
        "shared_expert.up_proj.weight": (width, hidden),
        "shared_expert.down_proj.weight": (hidden, width),
        "shared_expert_gate.weight": (1, hidden),
    }
    layers = (f"{model.backbone.hf.prefix}layers.{layer}.mlp." for layer in model.moe_layers)
    return {layer + name: shape for layer in layers for name, shape in shapes.items()}


def own_config(model: Model, scales: bool) -> dict:
    """What `modeling_moe_llava.py` reads on top."""
    moe, backbone = model.moe, model.backbone
    scaling = moe and moe.moe_router_topk_scaling_factor
    later: dict = {"norm_topk_prob": False} if moe and moe.moe_router_pre_softmax else {}
    later |= {"routed_scaling_factor": scaling} if scaling else {}
    if moe and moe.expert_groups:
        later |= {"expert_owners": experts_by_group(moe.expert_groups), "expert_penalty": moe.expert_groups.penalty}
    return later | {
        "architectures": ["MoELlavaForConditionalGeneration"],
        "model_type": OWN_TYPE,
        "auto_map": {
            "AutoConfig": "modeling_moe_llava.MoELlavaConfig",
            "AutoModel": "modeling_moe_llava.MoELlavaModel",
            "AutoModelForImageTextToText": "modeling_moe_llava.MoELlavaForConditionalGeneration",
        },
        "moe_layers": list(model.moe_layers),
        "num_experts": moe.num_moe_experts if moe else 0,
        "num_experts_per_tok": moe.moe_router_topk if moe else 0,
        "moe_intermediate_size": (moe and moe.moe_ffn_hidden_size) or 0,
        "normalize_top1": bool(moe and moe.normalize_top1),
        "use_residual": bool(moe and moe.use_residual),
        "expert_bias": bool(moe and moe.moe_router_enable_expert_bias),
        "shared_expert_intermediate_size": (moe and moe.moe_shared_expert_intermediate_size) or 0,
        "embedding_multiplier": backbone.embedding_multiplier,
        "scale_multimodal_embeddings": scales,
        "logits_divisor": backbone.logits_divisor,
        "output_layer_bias": backbone.output_layer_bias,
    }
