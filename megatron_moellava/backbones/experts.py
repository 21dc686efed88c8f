"""The experts of a family whose published models have some: `config.json` <-> MoEConfig, driven by the family's `Experts`.

Megatron-Core's field names on our side. Weights of several chosen experts that sum to 1 (`norm_topk_prob`) are a softmax
over the chosen logits, and those that do not are a softmax over all experts, taken before the choice.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace

from megatron_moellava.backbones.backbone import Backbone, Experts, MoELayers
from megatron_moellava.config import ConfigError, MoEConfig, from_dict
from megatron_moellava.placement import moe_layers

# What of a MoEConfig the weights of such a model mean; the rest says how they are trained and computed.
MIXTURE = (
    "num_moe_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "router",
    "normalize_top1",
    "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_enable_expert_bias",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "use_residual",
)


def mixture_of(moe: MoEConfig, backbone: Backbone) -> dict[str, object]:
    """The fields of `MIXTURE` and the layers, with what an unset width and a placement by name stand for."""
    fields: dict[str, object] = {name: getattr(moe, name) for name in MIXTURE}
    fields["moe_ffn_hidden_size"] = moe.moe_ffn_hidden_size or backbone.ffn_hidden_size
    return fields | {"placement": list(moe_layers(moe.placement, backbone.num_layers))}


def read_experts(settings: dict, experts: Experts, values: Mapping, name: str) -> MoEConfig:
    """The experts that the config of model `name` describes. `values`: the backbone's fields.

    Raises ConfigError for what no router here computes, and for values of another type.
    """
    wrong = [
        f"  {key}={value!r}: must be a number, or a list of layers"
        for key, value in settings.items()
        if key in experts.keys - {"norm_topk_prob"} and not _is_number(value) and value is not None
    ]
    if wrong:
        raise ConfigError(f"{name}: config.json cannot be read:\n" + "\n".join(wrong))
    said = dict(experts.defaults) | {key: settings[key] for key in experts.fields if settings.get(key) is not None}
    fields = dict(experts.constants) | {experts.fields[key]: value for key, value in said.items()}
    sizes = ("num_moe_experts", "moe_router_topk")
    missing = [key for key, field in experts.fields.items() if field in sizes and field not in fields]
    if missing:
        raise ConfigError(f"{name}: config.json lacks {', '.join(missing)}; add what the published model has")
    if experts.shared_count and settings.get(experts.shared_count):
        width = fields.get("moe_ffn_hidden_size") or values["ffn_hidden_size"]
        fields["moe_shared_expert_intermediate_size"] = settings[experts.shared_count] * width
    if not fields.get("moe_shared_expert_intermediate_size"):
        fields |= {"moe_shared_expert_intermediate_size": None, "moe_shared_expert_gate": False}
    if fields.get("moe_ffn_hidden_size") == values["ffn_hidden_size"]:
        fields["moe_ffn_hidden_size"] = None
    layers = experts.layers.read(settings | {"num_hidden_layers": values["num_layers"]})
    fields["placement"] = "dense" if layers == tuple(range(values["num_layers"])) else layers
    fields |= _weights(settings, experts, fields, name) | _groups(fields, name)
    if fields.get("moe_router_topk_scaling_factor") == 1:
        fields["moe_router_topk_scaling_factor"] = None
    return from_dict(MoEConfig, fields)


def _is_number(value: object) -> bool:
    whole = isinstance(value, list) and all(type(item) is int for item in value)
    return type(value) in (int, float) or whole


def _weights(settings: dict, experts: Experts, fields: dict, name: str) -> dict:
    """Whether the weights of the chosen experts sum to 1."""
    one, sums = fields["moe_router_topk"] == 1, True
    if experts.norm_topk_prob is not None:
        said = settings.get("norm_topk_prob")
        sums = experts.norm_topk_prob if said is None else said
    if fields.get("moe_router_enable_expert_bias"):  # sigmoids; Megatron-Core divides several by their sum
        if sums == one:
            raise ConfigError(
                f"{name}: norm_topk_prob={sums} with num_experts_per_tok={fields['moe_router_topk']}: the weights of chosen "
                "sigmoids sum to 1 in Megatron-Core if there are several, and are their own if there is one"
            )
        return {}
    return {"normalize_top1": one and sums, "moe_router_pre_softmax": not one and not sums}


def _groups(fields: dict, name: str) -> dict:
    """Groups that limit nothing are left out."""
    groups, chosen = fields.get("moe_router_num_groups"), fields.get("moe_router_group_topk")
    if not groups or not chosen or groups == chosen:
        return {"moe_router_num_groups": None, "moe_router_group_topk": None}
    if fields["moe_router_topk"] // chosen != GROUP_SCORES:
        raise ConfigError(
            f"{name}: topk_group={chosen} with num_experts_per_tok={fields['moe_router_topk']}: a group is judged by its best "
            f"{GROUP_SCORES} experts in transformers, and by its best num_experts_per_tok // topk_group in Megatron-Core"
        )
    return {}


GROUP_SCORES = 2  # transformers' models with sigmoid routing sum the best two scores of each group


def hf_experts_of(backbone: Backbone) -> dict:
    """The config keys of the experts: the inverse of `read_experts`; none of a dense model."""
    moe, experts = backbone.moe, backbone.hf.experts
    if moe is None or experts is None:
        return {}
    width = moe.moe_ffn_hidden_size or backbone.ffn_hidden_size
    values = asdict(replace(moe, moe_ffn_hidden_size=width)) | {
        "moe_shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size or 0,
        "moe_router_topk_scaling_factor": moe.moe_router_topk_scaling_factor or 1.0,
        "moe_router_num_groups": moe.moe_router_num_groups or 1,
        "moe_router_group_topk": moe.moe_router_group_topk or 1,
    }
    config = {key: values[field] for key, field in experts.fields.items()}
    if experts.shared_count:
        config[experts.shared_count] = values["moe_shared_expert_intermediate_size"] // width
    if experts.norm_topk_prob is not None:
        config["norm_topk_prob"] = sums_to_one(moe)
    layers = moe_layers(moe.placement, backbone.num_layers)
    return config | experts.layers.write(layers, backbone.num_layers)


def sums_to_one(moe: MoEConfig) -> bool:
    """Whether the weights of a token's experts sum to 1, before any scaling."""
    return not moe.moe_router_pre_softmax and (moe.moe_router_topk > 1 or moe.normalize_top1)


def _by_step(settings: dict) -> tuple[int, ...]:
    step, dense = settings.get("decoder_sparse_step") or 1, settings.get("mlp_only_layers") or ()
    return tuple(i for i in range(settings["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0)


def _first_dense(settings: dict) -> tuple[int, ...]:
    return tuple(range(settings.get("first_k_dense_replace") or 0, settings["num_hidden_layers"]))


EVERY_LAYER = MoELayers(read=lambda settings: tuple(range(settings["num_hidden_layers"])))
SPARSE_STEP = MoELayers(  # Qwen's way
    keys=("decoder_sparse_step", "mlp_only_layers"),
    read=_by_step,
    write=lambda layers, num_layers: {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(num_layers) if layer not in layers],
    },
)
FIRST_DENSE = MoELayers(  # DeepSeek's way
    keys=("first_k_dense_replace",),
    read=_first_dense,
    write=lambda layers, num_layers: {"first_k_dense_replace": min(layers)},
)
