"""What a checkpoint holds: `Model` is backbone + tower + MoE, and `megatron_tensors` lists every Megatron tensor of it.

The list comes from the sizes alone, not from the mapping tables, so that a line that is missing in a table shows up
as a tensor that nobody produces.
"""

from dataclasses import asdict, dataclass

from megatron_moellava.backbones import Backbone, backbone_fields, backbone_of_section
from megatron_moellava.config import MoEConfig, current_names, from_dict
from megatron_moellava.mapping import Shape
from megatron_moellava.placement import moe_layers
from megatron_moellava.towers import Tower, tower_fields, tower_of_section

LANGUAGE, TOWER, PROJECTOR = "language_model.", "vision_tower.", "projector."
UNUSED = f"{TOWER}unused."  # tensors that ride along so that an export is complete
EXPERTS = "experts.experts."  # Megatron-Core's key for SequentialMLP and the grouped MLP alike
RESIDUAL = "residual_mlp."


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    backbone: Backbone
    tower: Tower | None = None  # None: a language model alone
    moe: MoEConfig | None = None  # None: dense

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return moe_layers(self.moe.placement, self.backbone.num_layers) if self.moe else ()

    @property
    def required_moe(self) -> MoEConfig:
        """For code that only MoE models reach."""
        assert self.moe is not None
        return self.moe

    @property
    def required_tower(self) -> Tower:
        """For code that only models with a tower reach."""
        assert self.tower is not None
        return self.tower

    def to_json(self) -> dict:
        """The `model` section of run.json."""
        return {
            "backbone": self.backbone.name,
            "tower": self.tower.name if self.tower else None,
            "moe": asdict(self.moe) if self.moe else None,
            "backbone_fields": backbone_fields(self.backbone),
            "tower_fields": tower_fields(self.tower) if self.tower else None,
        }


def model_from_json(section: dict) -> Model:
    """The inverse of `Model.to_json`; also reads the short form, with names alone."""
    moe = from_dict(MoEConfig, current_names(section)["moe"]) if section.get("moe") else None
    return Model(backbone=backbone_of_section(section), tower=tower_of_section(section), moe=moe)


def megatron_tensors(model: Model) -> dict[str, Shape]:
    """Every Megatron key of a model with its global shape, without the tensors that ride along (`UNUSED`)."""
    tensors = {LANGUAGE + key: shape for key, shape in _language(model).items()}
    if model.tower:
        tensors |= {TOWER + key: shape for key, shape in _tower(model.tower).items()}
        tensors |= {PROJECTOR + key: shape for key, shape in _projector(model).items()}
    return tensors


def _language(model: Model) -> dict[str, Shape]:
    backbone = model.backbone
    hidden, vocab = backbone.hidden_size, backbone.vocab_size
    tensors = {"embedding.word_embeddings.weight": (vocab, hidden)}
    for layer in range(backbone.num_layers):
        prefix = f"decoder.layers.{layer}."
        tensors |= _prefixed(prefix, _attention(backbone))
        tensors |= _prefixed(prefix + "mlp.", _moe(model) if layer in model.moe_layers else _mlp(backbone))
    tensors |= _prefixed("decoder.final_layernorm.", _norm(backbone))
    if not backbone.share_embeddings_and_output_weights:
        tensors["output_layer.weight"] = (vocab, hidden)
    if backbone.output_layer_bias:
        tensors["output_layer.bias"] = (vocab,)
    return tensors


def _prefixed(prefix: str, tensors: dict[str, Shape]) -> dict[str, Shape]:
    return {prefix + key: shape for key, shape in tensors.items()}


def _linear(rows: int, columns: int, bias: bool) -> dict[str, Shape]:
    return {"weight": (rows, columns)} | ({"bias": (rows,)} if bias else {})


def _norm(backbone: Backbone) -> dict[str, Shape]:
    bias = backbone.normalization == "LayerNorm"
    return {"weight": (backbone.hidden_size,)} | ({"bias": (backbone.hidden_size,)} if bias else {})


def _attention(backbone: Backbone) -> dict[str, Shape]:
    """One layer's attention and norms."""
    heads, head = backbone.heads, backbone.kv_channels
    query, hidden = heads.num_attention_heads * head, backbone.hidden_size
    qkv_bias = backbone.add_qkv_bias or backbone.add_bias_linear
    tensors = _prefixed("input_layernorm.", _norm(backbone))
    tensors |= _prefixed(
        "self_attention.linear_qkv.", _linear(query + 2 * heads.num_query_groups * head, hidden, qkv_bias)
    )
    tensors |= _prefixed("self_attention.linear_proj.", _linear(hidden, query, backbone.add_bias_linear))
    if backbone.qk_layernorm:
        tensors |= {f"self_attention.{name}_layernorm.weight": (head,) for name in "qk"}
    if not backbone.parallel_residual:
        tensors |= _prefixed("pre_mlp_layernorm.", _norm(backbone))
    return tensors


def _mlp(backbone: Backbone) -> dict[str, Shape]:
    hidden, ffn, bias = backbone.hidden_size, backbone.ffn_hidden_size, backbone.add_bias_linear
    fc1 = _linear(ffn * (2 if backbone.gated_linear_unit else 1), hidden, bias)
    return _prefixed("linear_fc1.", fc1) | _prefixed("linear_fc2.", _linear(hidden, ffn, bias))


def _moe(model: Model) -> dict[str, Shape]:
    experts, dense = model.required_moe.num_moe_experts, _mlp(model.backbone)
    tensors: dict[str, Shape] = {"router.weight": (experts, model.backbone.hidden_size)}
    if model.required_moe.moe_router_enable_expert_bias:
        tensors["router.expert_bias"] = (experts,)
    tensors |= {EXPERTS + key: (experts, *shape) for key, shape in dense.items()}
    if model.required_moe.use_residual:
        tensors |= _prefixed(RESIDUAL, dense)
        tensors |= _prefixed("coefficient.", _linear(2, model.backbone.hidden_size, bias=True))
    return tensors


def _tower(tower: Tower) -> dict[str, Shape]:
    hidden, ffn = tower.hidden_size, tower.ffn_hidden_size
    patches = (hidden, 3, tower.patch_size, tower.patch_size)
    norm = {"weight": (hidden,), "bias": (hidden,)}
    tensors: dict[str, Shape] = {"class_token": (1, 1, hidden)} if tower.class_token else {}
    tensors |= {"conv1.weight": patches} | ({"conv1.bias": (hidden,)} if tower.patch_bias else {})
    tensors["position_embeddings.weight"] = (tower.num_positions, hidden)
    tensors |= _prefixed("ln_pre.", norm) if tower.pre_layernorm else {}
    for layer in range(tower.num_used_layers):
        block = _prefixed("input_layernorm.", norm) | _prefixed("pre_mlp_layernorm.", norm)
        block |= _prefixed("self_attention.linear_qkv.", _linear(3 * hidden, hidden, bias=True))
        block |= _prefixed("self_attention.linear_proj.", _linear(hidden, hidden, bias=True))
        block |= _prefixed("mlp.linear_fc1.", _linear(ffn, hidden, bias=True))
        block |= _prefixed("mlp.linear_fc2.", _linear(hidden, ffn, bias=True))
        tensors |= _prefixed(f"decoder.layers.{layer}.", block)
    return tensors


def _projector(model: Model) -> dict[str, Shape]:
    """LLaVA's mlp2x_gelu."""
    hidden = model.backbone.hidden_size
    fc1, fc2 = _linear(hidden, model.required_tower.hidden_size, bias=True), _linear(hidden, hidden, bias=True)
    return _prefixed("linear_fc1.", fc1) | _prefixed("linear_fc2.", fc2)
