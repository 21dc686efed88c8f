"""What a model holds: `Model` is backbone + tower + MoE, and `model_tensors` lists every Megatron tensor of it with its
shape, its role in training and the axes that parallel ranks divide.

The list comes from the sizes alone, not from the mapping tables, so that a line that is missing in a table shows up
as a tensor that nobody produces.
"""

import math
from dataclasses import asdict, dataclass, replace

from megatron_moellava.backbones import Backbone, backbone_fields, backbone_of_section
from megatron_moellava.config import (
    MoEConfig,
    ProjectorMoEConfig,
    RunConfig,
    TowerMoEConfig,
    current_names,
    from_dict,
)
from megatron_moellava.mapping import Shape
from megatron_moellava.placement import moe_layers
from megatron_moellava.towers import Tower, tower_fields, tower_of_section
from megatron_moellava.towers.branches import Branch, branches_of_data, branches_of_section

LANGUAGE, TOWER, PROJECTOR = "language_model.", "vision_tower.", "projector."
OWN_TOWER = "tower."  # of a modality, behind its prefix, as PROJECTOR is
UNUSED = f"{TOWER}unused."  # tensors that ride along so that an export is complete
EXPERTS = "experts.experts."  # Megatron-Core's key for SequentialMLP and the grouped MLP alike
RESIDUAL = "residual_mlp."
SHARED_EXPERTS = "shared_experts."
SHARED_GATE = "gate_weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The sizes of a whole model: backbone, tower and mixture."""

    backbone: Backbone
    tower: Tower | None = None  # None: a language model alone
    moe: MoEConfig | None = None  # None: dense
    branches: tuple[Branch, ...] = ()  # modalities with a tower or a projector of their own, which are dense
    tower_moe: TowerMoEConfig | None = None  # None: dense
    projector_moe: ProjectorMoEConfig | None = None  # None: dense

    @property
    def tower_moe_layers(self) -> tuple[int, ...]:
        """0-based layers of the tower with experts."""
        if self.tower is None or self.tower_moe is None:
            return ()
        return moe_layers(self.tower_moe.placement, self.tower.num_used_layers, "tower_moe.placement")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """0-based decoder layers with experts; none in a dense model."""
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

    def tower_of(self, name: str) -> Tower:
        """The tower that a tensor belongs to, by the tensor's name."""
        branch = next((item for item in self.branches if name.startswith(item.prefix)), None)
        return branch.seen_by(self.required_tower) if branch else self.required_tower

    def to_json(self) -> dict:
        """The `model` section of run.json."""
        backbone = self.backbone
        if backbone.moe is not None:  # its experts may have grown
            backbone = replace(backbone, moe=self.moe)
        return {
            "backbone": backbone.name,
            "tower": self.tower.name if self.tower else None,
            "moe": asdict(self.moe) if self.moe else None,
            "backbone_fields": backbone_fields(backbone),
            "tower_fields": tower_fields(self.tower) if self.tower else None,
            # Not in the file of a model that has none: versions that do not know them read it.
            **({"branches": [branch.to_json() for branch in self.branches]} if self.branches else {}),
            **({"tower_moe": asdict(self.tower_moe)} if self.tower_moe else {}),
            **({"projector_moe": asdict(self.projector_moe)} if self.projector_moe else {}),
        }


def model_from_json(section: dict) -> Model:
    """The inverse of `Model.to_json`; also reads the short form, with names alone."""
    moe = from_dict(MoEConfig, current_names(section)["moe"]) if section.get("moe") else None
    vision = {
        name: from_dict(kind, dict(section[name]))
        for name, kind in (("tower_moe", TowerMoEConfig), ("projector_moe", ProjectorMoEConfig))
        if section.get(name)
    }
    return Model(
        backbone=backbone_of_section(section),
        tower=tower_of_section(section),
        moe=moe,
        branches=branches_of_section(section),
        **vision,
    )


def model_of_run(run: RunConfig, backbone: Backbone, tower: Tower | None) -> Model:
    """The model of a run whose backbone and tower have been looked up."""
    return Model(
        backbone=backbone,
        tower=tower,
        moe=run.moe,
        branches=branches_of_data(run.data),
        tower_moe=run.tower_moe,
        projector_moe=run.projector_moe,
    )


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """One Megatron tensor of a whole model: what it is trained as, and which ranks divide it."""

    shape: Shape
    role: str  # of stages.ROLES
    split: int | None = None  # axis divided among tensor-parallel ranks (experts: expert tensor-parallel); None: whole
    is_expert: bool = False  # the first axis counts experts, and expert-parallel ranks divide it
    is_parameter: bool = True  # False: a buffer, which no optimizer knows

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


Tensors = dict[str, ModelTensor]


def expert_ffn_hidden_size(moe: MoEConfig, backbone: Backbone) -> int:
    """Width of each routed expert."""
    return moe.moe_ffn_hidden_size or backbone.ffn_hidden_size


def megatron_tensors(model: Model) -> dict[str, Shape]:
    """Every Megatron key of a model with its global shape, without the tensors that ride along (`UNUSED`)."""
    return {name: tensor.shape for name, tensor in model_tensors(model).items()}


def model_tensors(model: Model) -> Tensors:
    """The same keys with role and division. Parameter counts (`parameters.py`) are sums over this list."""
    moe_layers = set(model.moe_layers)
    tensors = _prefixed(LANGUAGE, embedding_tensors(model.backbone))
    for layer in range(model.backbone.num_layers):
        tensors |= _prefixed(f"{LANGUAGE}decoder.layers.{layer}.", layer_tensors(model, layer in moe_layers))
    tensors |= _prefixed(LANGUAGE, output_tensors(model.backbone))
    if model.tower:
        tensors |= _prefixed(TOWER, tower_tensors(model.tower, model.tower_moe, model.tower_moe_layers))
        tensors |= _prefixed(PROJECTOR, projector_tensors(model.backbone, model.tower, model.projector_moe))
    for branch in model.branches:
        tensors |= branch_tensors(model, branch)
    return tensors


def branch_tensors(model: Model, branch: Branch) -> Tensors:
    """What a modality has of its own."""
    tower, tensors = branch.seen_by(model.required_tower), {}
    if branch.tower:
        tensors = _prefixed(f"{branch.prefix}{OWN_TOWER}", tower_tensors(tower))
    if branch.own_projector:
        tensors |= _prefixed(f"{branch.prefix}{PROJECTOR}", projector_tensors(model.backbone, tower))
    return tensors


def embedding_tensors(backbone: Backbone) -> Tensors:
    """The word embedding [V, H]; its rows are divided among tensor-parallel ranks."""
    shape = (backbone.vocab_size, backbone.hidden_size)
    return {"embedding.word_embeddings.weight": ModelTensor(shape, "language.embedding", split=0)}


def output_tensors(backbone: Backbone) -> Tensors:
    """What follows the decoder layers. An output layer that shares the embedding's weight has none of its own."""
    shape = (backbone.vocab_size, backbone.hidden_size)
    tensors = _prefixed("decoder.final_layernorm.", _norm(backbone))
    if not backbone.share_embeddings_and_output_weights:
        tensors["output_layer.weight"] = ModelTensor(shape, "language.embedding", split=0)
    if backbone.output_layer_bias:
        tensors["output_layer.bias"] = ModelTensor(shape[:1], "language.embedding", split=0)
    return tensors


def layer_tensors(model: Model, is_moe: bool) -> Tensors:
    """One decoder layer."""
    ffn = _moe(model) if is_moe else _mlp(model.backbone, model.backbone.ffn_hidden_size, "language.ffn")
    return _attention(model.backbone) | _prefixed("mlp.", ffn)


def _prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def _linear(rows: int, columns: int, bias: bool, role: str, split: int | None = None) -> Tensors:
    """Split along its outputs (0), a layer divides its bias too; along its inputs (1), every rank has the bias."""
    tensors = {"weight": ModelTensor((rows, columns), role, split)}
    if bias:
        tensors["bias"] = ModelTensor((rows,), role, 0 if split == 0 else None)
    return tensors


def _norm(backbone: Backbone) -> Tensors:
    return _norm_of(backbone.hidden_size, "language.norm", bias=backbone.normalization == "LayerNorm")


def _norm_of(size: int, role: str, bias: bool) -> Tensors:
    vector = ModelTensor((size,), role)
    return {"weight": vector} | ({"bias": vector} if bias else {})


def _attention(backbone: Backbone) -> Tensors:
    """One layer's attention and norms."""
    if backbone.multi_latent_attention is not None:
        return _latent_attention(backbone)
    heads, head, role = backbone.heads, backbone.kv_channels, "language.attention"
    query, hidden = heads.num_attention_heads * head, backbone.hidden_size
    qkv = query + 2 * heads.num_query_groups * head
    qkv_bias = backbone.add_qkv_bias or backbone.add_bias_linear
    tensors = _prefixed("input_layernorm.", _norm(backbone))
    tensors |= _prefixed("self_attention.linear_qkv.", _linear(qkv, hidden, qkv_bias, role, split=0))
    tensors |= _prefixed("self_attention.linear_proj.", _linear(hidden, query, backbone.add_bias_linear, role, split=1))
    if backbone.qk_layernorm:
        has_bias = backbone.normalization == "LayerNorm"
        sizes = {"q": query, "k": heads.num_query_groups * head} if backbone.qk_layernorm_spans_heads else {}
        for name in "qk":
            norm = _norm_of(sizes.get(name, head), role, has_bias)
            tensors |= _prefixed(f"self_attention.{name}_layernorm.", norm)
    if not backbone.parallel_residual:
        tensors |= _prefixed("pre_mlp_layernorm.", _norm(backbone))
    return tensors


def latent_matrices(backbone: Backbone) -> dict[str, Shape]:
    """[outputs, inputs] of the matrices before the scores of multi-latent attention, in the order of the computation."""
    latent, heads, hidden = backbone.multi_latent_attention, backbone.num_attention_heads, backbone.hidden_size
    assert latent is not None
    query = heads * backbone.kv_channels
    of_queries: dict[str, Shape] = {"linear_q_proj": (query, hidden)}
    if latent.q_lora_rank:
        rank = latent.q_lora_rank
        of_queries = {"linear_q_down_proj": (rank, hidden), "linear_q_up_proj": (query, rank)}
    return of_queries | {
        "linear_kv_down_proj": (latent.kv_lora_rank + latent.qk_pos_emb_head_dim, hidden),
        "linear_kv_up_proj": (heads * (latent.qk_head_dim + latent.v_head_dim), latent.kv_lora_rank),
    }


def _latent_attention(backbone: Backbone) -> Tensors:
    """One layer's attention and norms; every matrix but the last is divided by its outputs."""
    latent, role, prefix = backbone.multi_latent_attention, "language.attention", "self_attention."
    assert latent is not None
    value, hidden = backbone.num_attention_heads * latent.v_head_dim, backbone.hidden_size
    tensors = _prefixed("input_layernorm.", _norm(backbone))
    for name, (rows, columns) in latent_matrices(backbone).items():
        tensors |= _prefixed(f"{prefix}{name}.", _linear(rows, columns, False, role, split=0))
    for name, size in (("q", latent.q_lora_rank), ("kv", latent.kv_lora_rank)):
        if size:
            tensors |= _prefixed(f"{prefix}{name}_layernorm.", _norm_of(size, role, bias=False))
    tensors |= _prefixed(f"{prefix}linear_proj.", _linear(hidden, value, False, role, split=1))
    return tensors | _prefixed("pre_mlp_layernorm.", _norm(backbone))


def _mlp(backbone: Backbone, inner: int, role: str) -> Tensors:
    hidden, bias = backbone.hidden_size, backbone.add_bias_linear
    fc1 = _linear(inner * (2 if backbone.gated_linear_unit else 1), hidden, bias, role, split=0)
    return _prefixed("linear_fc1.", fc1) | _prefixed("linear_fc2.", _linear(hidden, inner, bias, role, split=1))


def _moe(model: Model) -> Tensors:
    moe, backbone = model.required_moe, model.backbone
    experts, inner = moe.num_moe_experts, expert_ffn_hidden_size(moe, backbone)
    tensors = {"router.weight": ModelTensor((experts, backbone.hidden_size), "router")}
    if moe.moe_router_enable_expert_bias:
        tensors["router.expert_bias"] = ModelTensor((experts,), "router", is_parameter=False)
    tensors |= _copies(experts, _mlp(backbone, inner, "experts"))
    if moe.use_residual:
        tensors |= _prefixed(RESIDUAL, _mlp(backbone, backbone.ffn_hidden_size, "language.ffn"))
        tensors |= _prefixed("coefficient.", _linear(2, backbone.hidden_size, bias=True, role="router"))
    if moe.moe_shared_expert_intermediate_size:
        tensors |= _prefixed(SHARED_EXPERTS, _mlp(backbone, moe.moe_shared_expert_intermediate_size, "experts"))
    if moe.moe_shared_expert_gate:
        tensors[SHARED_EXPERTS + SHARED_GATE] = ModelTensor((1, backbone.hidden_size), "experts")
    return tensors


def tower_tensors(tower: Tower, moe: TowerMoEConfig | None = None, layers: tuple[int, ...] = ()) -> Tensors:
    """A whole tower, as far as features need it; `layers`: those with the experts of `moe`."""
    tensors = tower_stem_tensors(tower)
    for layer in range(tower.num_used_layers):
        own = tower_layer_tensors(tower, moe if layer in layers else None)
        tensors |= _prefixed(f"decoder.layers.{layer}.", own)
    return tensors


def _copies(experts: int, mlp: Tensors) -> Tensors:
    """Those of an MLP, as many times as there are experts."""
    return {
        EXPERTS + key: ModelTensor(
            (experts, *one.shape), one.role, None if one.split is None else one.split + 1, is_expert=True
        )
        for key, one in mlp.items()
    }


def _routed(moe: ProjectorMoEConfig, mlp: Tensors, role: str) -> Tensors:
    """An MLP of tower or projector as experts, and the router that chooses among them."""
    experts, inputs = moe.num_moe_experts, mlp["linear_fc1.weight"].shape[1]
    return {"router.weight": ModelTensor((experts, inputs), role)} | _copies(experts, mlp)


def tower_stem_tensors(tower: Tower) -> Tensors:
    """What lies around the tower's layers."""
    hidden, role = tower.hidden_size, "tower"
    side = tower.patch_size
    stem, patches = ("embedder", (hidden, 3 * side**2)) if tower.native else ("conv1", (hidden, 3, side, side))
    tensors = {"class_token": ModelTensor((1, 1, hidden), role)} if tower.class_token else {}
    tensors[f"{stem}.weight"] = ModelTensor(patches, role)
    if tower.patch_bias:
        tensors[f"{stem}.bias"] = ModelTensor((hidden,), role)
    tensors["position_embeddings.weight"] = ModelTensor((tower.num_positions, hidden), role)
    norms = {"ln_pre.": tower.pre_layernorm, "ln_post.": tower.post_layernorm}
    for name in (name for name, is_there in norms.items() if is_there):
        tensors |= _prefixed(name, _norm_of(hidden, role, bias=True))
    return tensors


def tower_layer_tensors(tower: Tower, moe: TowerMoEConfig | None = None) -> Tensors:
    """One layer of a tower, dense or with the experts of `moe`."""
    role = "tower"
    hidden, ffn = tower.hidden_size, tower.ffn_hidden_size
    norm = _norm_of(hidden, role, bias=True)
    tensors = _prefixed("input_layernorm.", norm) | _prefixed("pre_mlp_layernorm.", norm)
    for name, rows, columns, split in (
        ("self_attention.linear_qkv.", 3 * hidden, hidden, 0),
        ("self_attention.linear_proj.", hidden, hidden, 1),
    ):
        tensors |= _prefixed(name, _linear(rows, columns, True, role, split))
    if tower.takes_videos:
        tensors |= {
            name.replace("self_", "temporal_"): tensor for name, tensor in tensors.items() if name.startswith("self_")
        }
        tensors |= _prefixed("temporal_layernorm.", norm)
        tensors["temporal_embedding"] = ModelTensor((1, tower.num_frames, hidden), role)
    mlp = _two_layers(hidden, ffn, hidden, role)
    return tensors | _prefixed("mlp.", _routed(moe, mlp, role) if moe else mlp)


def _two_layers(inputs: int, inner: int, outputs: int, role: str) -> Tensors:
    fc1, fc2 = _linear(inner, inputs, True, role, split=0), _linear(outputs, inner, True, role, split=1)
    return _prefixed("linear_fc1.", fc1) | _prefixed("linear_fc2.", fc2)


def projector_tensors(backbone: Backbone, tower: Tower, moe: ProjectorMoEConfig | None = None) -> Tensors:
    """LLaVA's mlp2x_gelu, over what the projector's kind makes of the features."""
    hidden, role = backbone.hidden_size, "projector"
    mlp = _two_layers(tower.projector_input_size, hidden, hidden, role)
    newline = {"image_newline.weight": ModelTensor((hidden,), role)} if tower.newline else {}
    return (_routed(moe, mlp, role) if moe else mlp) | newline
