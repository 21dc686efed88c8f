"""The table of layouts: what is computed (MODELS), how it is spread over processes (LAYOUTS), and who continues whom.

Every layout is compared with one process that computes the same model on the same rows. All of it is data; `worker.py`
runs it and `test_layouts.py` asserts it.
"""

from dataclasses import asdict, dataclass, field

from megatron_moellava.backbones import BACKBONES

STEPS = 3  # optimizer steps of every run
SAVED_AT = 2  # the step after which a source of CONTINUATIONS writes its checkpoint
ROLES = [
    "tower",
    "projector",
    "language.embedding",
    "language.attention",
    "language.norm",
    "language.ffn",
    "experts",
    "router",
]
# Coefficients far above the recipes', so that the losses of the router have a say in every gradient.
MOE = {"num_moe_experts": 4, "placement": "sparse", "moe_aux_loss_coeff": 0.1}


def own_experts(backbone: str) -> dict:
    """Those of a backbone that has some."""
    return asdict(BACKBONES[backbone].moe) | {"moe_aux_loss_coeff": 0.1}


LORA = {
    "training.lora.rank": 3,
    "training.lora.alpha": 6.0,
    "training.lora.targets": ["attention", "ffn", "experts", "router", "projector", "tower"],
}


def apart(**fields) -> dict:
    """Depth with a tower or a projector of its own."""
    return {"data.modalities": [{"name": "depth", "levels": "uint16", **fields}]}


LORA_SHARED = {"training.lora.rank": 4, "training.lora.alpha": 4.0, "training.lora.shared_outer": True}
MUON = {"optimizer.optimizer": "muon", "optimizer.muon_fp32_matmul_prec": "highest", "optimizer.lr": 1e-3}
CUMO = {
    "tower_moe": {"moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.05},
    "projector_moe": {"moe_aux_loss_coeff": 0.2, "moe_z_loss_coeff": 0.03},
}
RATES = {
    "optimizer.lr_decay_style": "WSD",
    "optimizer.lr_wsd_decay_style": "linear",
    "optimizer.lr_wsd_decay_iters": 2,
    "optimizer.roles": {
        "tower": {"lr": 1e-3},
        "projector": {"lr": 2e-3, "weight_decay": 0.0},
        "language": {"weight_decay": 0.2},
        "experts": {"lr": 4e-3, "min_lr": 2e-3},
        "router": {"lr": 5e-3, "weight_decay": 0.3},
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What is computed. `run` holds dotted fields of RunConfig."""

    backbone: str = "llama-tiny"
    moe: dict | None = None
    roles: list | None = field(default_factory=lambda: ROLES)
    run: dict = field(default_factory=dict)
    # "packed", "padded", "text": packed without any image, "native": packed, images at their own resolution, "modalities":
    # packed, some images are of depth, or "videos": packed, with frames that are pooled in space and time
    rows: str = "packed"


MODELS = {
    "llama": Model(moe=MOE),
    "phi": Model(backbone="phi-2-tiny", moe=MOE),
    "llama-dense": Model(),
    "phi-dense": Model(backbone="phi-2-tiny"),
    # Tied embeddings, and a vocabulary that no tensor-parallel size divides.
    "tied": Model(backbone="llama-tiny-tied", moe=MOE),
    "tied-dense": Model(backbone="llama-tiny-tied"),
    "biased-output": Model(backbone="phi-2-tiny-biased-output", moe=MOE),
    **{
        f"{name}-stage{stage}": Model(
            backbone=backbone, moe=MOE if stage == 3 else None, roles=None, run={"training.stage": stage}
        )
        for name, backbone in (("llama", "llama-tiny"), ("phi", "phi-2-tiny"))
        for stage in (1, 2, 3)
    },
    # Patches of images of different sizes as one row; with a pixel shuffle; with the tower frozen; tiles put together.
    "native": Model(moe=MOE, rows="native", run={"model.tower": "naflex-tiny"}),
    "native-shuffle": Model(moe=MOE, rows="native", run={"model.tower": "naflex-tiny@pixel_shuffle"}),
    "newline": Model(moe=MOE, rows="native", run={"model.tower": "siglip-tiny@newline"}),
    "native-stage3": Model(moe=MOE, rows="native", roles=None, run={"model.tower": "naflex-tiny", "training.stage": 3}),
    # Depth beside plain pictures, also in one sample; the statistics tell them apart.
    "modalities": Model(moe=MOE, rows="modalities", run={"data.modalities": [{"name": "depth", "levels": "uint16"}]}),
    # depth has a tower of its own, of another resolution, and a projector; or one of the two
    "own-tower": Model(
        moe=MOE, rows="modalities", run=apart(tower="clip-tiny", projector="own") | {"model.tower": "siglip-tiny"}
    ),
    # ... beside pictures at their own resolution
    "own-tower-native": Model(
        moe=MOE, rows="modalities", run=apart(tower="clip-tiny", projector="own") | {"model.tower": "naflex-tiny"}
    ),
    "own-projector": Model(moe=MOE, rows="modalities", run=apart(projector="own")),
    "own-tower-stage1": Model(
        moe=None, roles=None, rows="modalities", run=apart(tower="clip-tiny") | {"training.stage": 1}
    ),
    "own-tower-lora": Model(moe=MOE, roles=[], rows="modalities", run=apart(tower="clip-tiny", projector="own") | LORA),
    "videos": Model(moe=MOE, rows="videos", run={"data.video_pooling": "2x2x2"}),
    "videos-stage3": Model(
        moe=MOE, rows="videos", roles=None, run={"data.video_pooling": "2x2x2", "training.stage": 3}
    ),
    # The tower attends across the frames of a video; frozen, too, and with adapters.
    "across-frames": Model(moe=MOE, run={"model.tower": "languagebind-video-tiny", "data.video_frames": 4}),
    "across-frames-stage1": Model(
        roles=None, run={"model.tower": "languagebind-video-tiny", "data.video_frames": 4, "training.stage": 1}
    ),
    "across-frames-lora": Model(
        moe=MOE, roles=[], run={"model.tower": "languagebind-video-tiny", "data.video_frames": 4} | LORA
    ),
    "text-only": Model(moe=MOE, rows="text"),
    "padded": Model(moe=MOE, rows="padded"),
    "padded-phi": Model(backbone="phi-2-tiny", moe=MOE, rows="padded"),
    "router-losses": Model(moe=MOE | {"moe_z_loss_coeff": 0.05}),
    "sequence-aux-loss": Model(moe=MOE | {"moe_router_load_balancing_type": "seq_aux_loss"}, rows="padded"),
    "global-aux-loss": Model(moe=MOE | {"moe_router_load_balancing_type": "global_aux_loss"}, rows="padded"),
    # The last of two pipeline stages has no router, and has to log what the first one's say.
    "first-half": Model(moe=MOE | {"placement": "first_half", "moe_z_loss_coeff": 0.05}, rows="padded"),
    "capacity": Model(moe=MOE | {"moe_expert_capacity_factor": 0.75}, rows="padded"),
    # Nothing before the first experts is trained, so a recomputed layer has no input that requires a gradient.
    "experts-only": Model(moe=MOE, roles=["experts", "router"]),
    "attention-only": Model(moe=MOE, roles=["language.attention"], rows="padded"),
    "shared-experts": Model(moe=MOE | {"moe_shared_expert_intermediate_size": 64}),
    "compiled": Model(moe=MOE, run={"training.compile": True}),
    "expert-bias": Model(moe=MOE | {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.01}),
    # Experts of images, of text and of both, balanced apart; dealt, softly, with a bias; without groups, by whole batches.
    "by-modality": Model(
        moe=MOE
        | {
            "expert_groups": {"image": 1, "text": 1, "shared": 2},
            "balance_per_modality": True,
            "moe_z_loss_coeff": 0.05,
        }
    ),
    "by-modality-bias": Model(
        moe=MOE
        | {
            "expert_groups": {"image": 2, "text": 2, "order": "dealt", "penalty": 0.5},
            "balance_per_modality": True,
            "moe_router_load_balancing_type": "seq_aux_loss",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.01,
        },
        rows="padded",
    ),
    "by-modality-capacity": Model(
        moe=MOE | {"expert_groups": {"image": 2, "text": 2}, "moe_expert_capacity_factor": 0.75}, rows="padded"
    ),
    "balance-per-modality": Model(
        moe=MOE | {"balance_per_modality": True, "moe_router_load_balancing_type": "global_aux_loss"}, rows="padded"
    ),
    # Experts in the tower and the projector, too (CuMo): beside a dense language model, one with experts and biases that
    # balance them, with the tower frozen, in stage 1, with pictures at their own resolution, and put together of tiles.
    "cumo": Model(run=CUMO),
    "cumo-moe": Model(moe=MOE | {"moe_z_loss_coeff": 0.05}, run=CUMO),
    "cumo-bias": Model(
        moe=MOE | {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.01},
        run=CUMO | {"tower_moe": CUMO["tower_moe"] | {"placement": [1], "moe_router_topk": 1, "normalize_top1": True}},
        rows="padded",
    ),
    "cumo-stage3": Model(moe=MOE, roles=None, run=CUMO | {"training.stage": 3}),
    "cumo-stage1": Model(roles=None, run={"projector_moe": CUMO["projector_moe"], "training.stage": 1}),
    "cumo-native": Model(rows="native", run=CUMO | {"model.tower": "naflex-tiny@pixel_shuffle"}),
    "cumo-newline": Model(rows="native", run=CUMO | {"model.tower": "siglip-tiny@newline"}),
    "bf16-cumo": Model(moe=MOE, run=CUMO | {"training.precision": "bf16"}),
    "residual": Model(backbone="phi-2-tiny", moe=MOE | {"use_residual": True}),
    "top1": Model(moe=MOE | {"moe_router_topk": 1}),
    "normalized-top1": Model(moe=MOE | {"moe_router_topk": 1, "normalize_top1": True}),
    # Language models with experts of their own: other routers, a gated shared expert, a norm over all heads.
    "mixtral": Model(backbone="mixtral-tiny", moe=own_experts("mixtral-tiny")),
    "qwen2-moe": Model(backbone="qwen2-moe-tiny", moe=own_experts("qwen2-moe-tiny")),
    "olmoe": Model(backbone="olmoe-tiny", moe=own_experts("olmoe-tiny")),
    "dots1": Model(backbone="dots1-tiny", moe=own_experts("dots1-tiny") | {"moe_router_bias_update_rate": 0.01}),
    "deepseek-moe": Model(backbone="deepseek-moe-tiny", moe=own_experts("deepseek-moe-tiny")),
    "deepseek-v2": Model(backbone="deepseek-v2-tiny", moe=own_experts("deepseek-v2-tiny")),
    "deepseek-v3": Model(
        backbone="deepseek-v3-tiny", moe=own_experts("deepseek-v3-tiny") | {"moe_router_bias_update_rate": 0.01}
    ),
    "deepseek-v3-padded": Model(backbone="deepseek-v3-tiny", moe=own_experts("deepseek-v3-tiny"), rows="padded"),
    "deepseek-v3-stage3": Model(
        backbone="deepseek-v3-tiny", moe=own_experts("deepseek-v3-tiny"), roles=None, run={"training.stage": 3}
    ),
    "olmoe-padded": Model(backbone="olmoe-tiny", moe=own_experts("olmoe-tiny"), rows="padded"),
    "qwen2-moe-stage1": Model(
        backbone="qwen2-moe-tiny", moe=own_experts("qwen2-moe-tiny"), roles=None, run={"training.stage": 1}
    ),
    # Experts of a quarter of the dense FFN's width.
    "granular": Model(moe=MOE | {"num_moe_experts": 8, "moe_router_topk": 4, "moe_ffn_hidden_size": 96}),
    "granular-phi": Model(
        backbone="phi-2-tiny", moe=MOE | {"num_moe_experts": 8, "moe_router_topk": 4, "moe_ffn_hidden_size": 128}
    ),
    # DeepSpeed's gate: half of the slots that are needed, so that tokens are dropped; the noise is injected.
    "original": Model(moe=MOE | {"router": "original", "moe_expert_capacity_factor": 0.5}, rows="padded"),
    "original-phi": Model(
        backbone="phi-2-tiny", moe=MOE | {"router": "original", "moe_expert_capacity_factor": 0.5}, rows="padded"
    ),
    "original-top1": Model(
        moe=MOE | {"router": "original", "moe_expert_capacity_factor": 0.5, "moe_router_topk": 1}, rows="padded"
    ),
    # The same with the router's own noise, which must not depend on tensor and pipeline layout.
    "original-noise": Model(moe=MOE | {"router": "original", "moe_expert_capacity_factor": 1.0}, rows="padded"),
    # Adapters everywhere, of a rank that no product is aligned to; projector and router beside them.
    "lora": Model(moe=MOE | {"moe_shared_expert_intermediate_size": 64}, roles=["language.norm"], run=LORA),
    "lora-phi": Model(backbone="phi-2-tiny", moe=MOE, roles=[], run=LORA, rows="padded"),
    "lora-dense": Model(roles=None, run={"training.lora.rank": 8, "training.lora.alpha": 8.0}),
    "lora-shared": Model(moe=MOE, roles=["router"], run=LORA_SHARED),
    "lora-mla": Model(
        backbone="deepseek-v3-tiny", moe=own_experts("deepseek-v3-tiny"), roles=["language.norm"], run=LORA
    ),
    # Every part of the model has a rate of its own, in the cooldown of a schedule.
    "rates": Model(moe=MOE, run=RATES),
    # Orthogonalized in fp32: in bf16, Megatron-Core's default, what two layouts sum up differently would be seen.
    "muon": Model(moe=MOE, run=MUON),
    "muon-phi": Model(backbone="phi-2-tiny", moe=MOE, run=MUON),
    "muon-stage3": Model(moe=MOE, roles=None, run=MUON | {"training.stage": 3}),
    "muon-stage1": Model(roles=None, run=MUON | {"training.stage": 1}),
    "muon-bf16": Model(moe=MOE, run=MUON | {"training.precision": "bf16"}),
    "average": Model(moe=MOE, run={"optimizer.ema_decay": 0.3}),
    "bf16": Model(moe=MOE, run={"training.precision": "bf16"}),
    # FP8 as a CPU emulates it. In blocks a pipeline stage computes what one process does, and so does a rank with its own
    # experts; a scale of a whole tensor depends on which tokens and which rows of a weight a rank has.
    **{
        f"fp8-{recipe}": Model(moe=MOE, run={"training.fp8_recipe": recipe})
        for recipe in ("tensorwise", "delayed", "blockwise", "mxfp8")
    },
    "fp16": Model(moe=MOE, run={"training.precision": "fp16"}),
    # Without fp32 main parameters; the random bits must not depend on who holds which part of a weight.
    "bf16-params": Model(
        moe=MOE,
        run={
            "training.precision": "bf16",
            "optimizer.main_params_dtype": "bf16",
            "optimizer.stochastic_rounding": True,
        },
    ),
    "bf16-phi": Model(backbone="phi-2-tiny", moe=MOE, run={"training.precision": "bf16"}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a model is spread, and switches that must not change a number. `run` holds dotted fields of RunConfig."""

    model: str
    name: str  # of the layout alone
    world: int = 1
    run: dict = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.model}:{self.name}"


SHORT = {
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "vpp": "parallel.virtual_pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "ep": "parallel.expert_model_parallel_size",
    "etp": "parallel.expert_tensor_parallel_size",
    "split": "parallel.pipeline_split",
    "first": "parallel.num_layers_in_first_pipeline_stage",
    "recompute": "training.recompute",
    "recompute_tower": "training.recompute_tower",
    "grouped": "moe.moe_grouped_gemm",
    "dispatcher": "moe.moe_token_dispatcher_type",
    "overlap_grads": "optimizer.overlap_grad_reduce",
    "overlap_params": "optimizer.overlap_param_gather",
}


def _layouts(models: str, name: str, world: int, **options) -> list[Layout]:
    run = {SHORT[option]: value for option, value in options.items()}
    return [Layout(model=model, name=name, world=world, run=run) for model in models.split()]


REFERENCES = {model: Layout(model=model, name="one") for model in MODELS}
LAYOUTS = [
    # one process, other switches
    *_layouts("llama phi", "sequential", 1, grouped=False),
    *_layouts("llama phi", "allgather", 1, dispatcher="allgather"),
    *_layouts("llama phi original-noise", "recompute-full", 1, recompute="full"),
    *_layouts("llama", "recompute-selective", 1, recompute="selective"),
    *_layouts("llama phi original-noise", "recompute-moe", 1, recompute="moe"),
    *_layouts("llama phi", "recompute-moe-act", 1, recompute="moe_act"),
    *_layouts("llama", "recompute-tower", 1, recompute_tower=True),
    # two processes
    *_layouts("llama phi", "dp2", 2),
    *_layouts("llama phi", "tp2", 2, tp=2),
    *_layouts("llama phi", "pp2", 2, pp=2),
    *_layouts("llama phi", "ep2", 2, ep=2),
    *_layouts("llama phi", "tp2-ep2-etp1", 2, tp=2, ep=2, etp=1),
    *_layouts("llama", "tp2-etp2", 2, tp=2, etp=2),
    *_layouts("llama phi", "pp2-vpp2", 2, pp=2, vpp=2),
    *_layouts("llama", "pp2-first1", 2, pp=2, first=1),
    *_layouts("phi", "pp2-first3", 2, pp=2, first=3),
    *_layouts("llama phi", "pp2-cost", 2, pp=2, split="cost"),
    *_layouts("llama", "pp2-vpp2-cost", 2, pp=2, vpp=2, split="cost"),
    *_layouts("llama", "pp2-1-3", 2, pp=2, split=[1, 3]),
    *_layouts("llama-dense phi-dense", "dp2", 2),
    *_layouts("llama-dense phi-dense", "tp2", 2, tp=2),
    *_layouts("llama-dense phi-dense", "pp2", 2, pp=2),
    *_layouts("llama", "dp2-overlap-grads", 2, overlap_grads=True),
    *_layouts("llama llama-stage3", "ep2-overlap", 2, ep=2, overlap_grads=True, overlap_params=True),
    *_layouts("llama", "dp2-overlap", 2, overlap_grads=True, overlap_params=True),
    *_layouts("llama", "pp2-vpp2-overlap", 2, pp=2, vpp=2, overlap_grads=True),
    # the second rank trains nothing; a tied embedding is reduced across stages
    *_layouts("llama-stage1 tied", "pp2-overlap", 2, pp=2, overlap_grads=True, overlap_params=True),
    *_layouts("llama", "ep2-allgather", 2, ep=2, dispatcher="allgather"),
    *_layouts("llama", "tp2-ep2-allgather", 2, tp=2, ep=2, dispatcher="allgather"),
    *_layouts("llama phi", "ep2-sequential", 2, ep=2, grouped=False),
    *_layouts("llama", "tp2-etp2-sequential", 2, tp=2, etp=2, grouped=False),
    *_layouts("llama", "tp2-ep2-recompute-full", 2, tp=2, ep=2, recompute="full"),
    *_layouts("llama", "pp2-recompute-moe", 2, pp=2, recompute="moe"),
    *_layouts("llama", "tp2-ep2-recompute-moe-act", 2, tp=2, ep=2, recompute="moe_act"),
    *_layouts("llama", "ep2-recompute-tower", 2, ep=2, recompute_tower=True),
    *_layouts("llama-stage1 phi-stage1 llama-stage2", "dp2", 2),
    *_layouts("llama-stage1 phi-stage1 llama-stage2", "tp2", 2, tp=2),
    *_layouts("llama-stage1 phi-stage1 llama-stage2", "pp2", 2, pp=2),  # stage 1: the second rank trains nothing
    *_layouts("llama-stage3 phi-stage3", "ep2", 2, ep=2),
    *_layouts("llama-stage3", "tp2-ep2-etp1", 2, tp=2, ep=2),
    *_layouts("llama-stage3", "pp2-vpp2", 2, pp=2, vpp=2),
    *_layouts("native native-shuffle newline", "dp2", 2),
    *_layouts("native native-shuffle newline", "tp2", 2, tp=2),
    *_layouts("native native-shuffle native-stage3 newline", "pp2", 2, pp=2),
    *_layouts("native native-shuffle native-stage3 newline", "cp2", 2, cp=2),
    *_layouts("native native-stage3 newline", "ep2", 2, ep=2),
    *_layouts("native", "recompute-tower", 1, recompute_tower=True),
    *_layouts("modalities", "dp2", 2),
    *_layouts("modalities", "tp2", 2, tp=2),
    *_layouts("modalities", "pp2", 2, pp=2),
    *_layouts("modalities", "cp2", 2, cp=2),
    *_layouts("modalities", "ep2", 2, ep=2),
    *_layouts("own-tower own-projector own-tower-stage1 own-tower-lora", "dp2", 2),
    *_layouts("own-tower own-projector own-tower-stage1 own-tower-lora", "tp2", 2, tp=2),
    *_layouts("own-tower own-projector own-tower-stage1 own-tower-lora", "pp2", 2, pp=2),
    *_layouts("own-tower own-projector own-tower-lora", "cp2", 2, cp=2),
    *_layouts("own-tower own-projector", "ep2", 2, ep=2),
    *_layouts("own-tower", "recompute-tower", 1, recompute_tower=True),
    *_layouts("own-tower-native", "dp2", 2),
    *_layouts("own-tower-native", "tp2", 2, tp=2),
    *_layouts("own-tower-native", "pp2", 2, pp=2),
    *_layouts("own-tower-native", "cp2", 2, cp=2),
    *_layouts("videos", "dp2", 2),
    *_layouts("videos", "tp2", 2, tp=2),
    *_layouts("videos videos-stage3", "pp2", 2, pp=2),
    *_layouts("videos videos-stage3", "cp2", 2, cp=2),
    *_layouts("videos-stage3", "ep2", 2, ep=2),
    *_layouts("videos", "recompute-tower", 1, recompute_tower=True),
    *_layouts("across-frames", "dp2", 2),
    *_layouts("across-frames across-frames-stage1 across-frames-lora", "tp2", 2, tp=2),
    *_layouts("across-frames across-frames-stage1", "pp2", 2, pp=2),
    *_layouts("across-frames across-frames-lora", "cp2", 2, cp=2),
    *_layouts("across-frames", "recompute-tower", 1, recompute_tower=True),
    *_layouts("text-only", "dp2", 2),
    *_layouts("text-only", "tp2-ep2-etp1", 2, tp=2, ep=2),
    *_layouts("text-only", "pp2", 2, pp=2),
    *_layouts("tied", "tp2-ep2-etp1", 2, tp=2, ep=2),
    *_layouts("tied tied-dense", "pp2", 2, pp=2),
    *_layouts("tied-dense", "pp2-vpp2", 2, pp=2, vpp=2),
    *_layouts("biased-output", "tp2", 2, tp=2),
    *_layouts("padded padded-phi", "ep2", 2, ep=2),
    *_layouts("padded", "tp2", 2, tp=2),
    *_layouts("padded", "pp2", 2, pp=2),
    *_layouts("router-losses sequence-aux-loss shared-experts expert-bias residual top1", "ep2", 2, ep=2),
    *_layouts("router-losses sequence-aux-loss shared-experts expert-bias residual top1", "tp2", 2, tp=2),
    *_layouts("router-losses expert-bias residual shared-experts", "pp2", 2, pp=2),
    *_layouts("shared-experts", "tp2-ep2-etp1", 2, tp=2, ep=2),
    *_layouts("granular granular-phi normalized-top1", "ep2", 2, ep=2),
    *_layouts("granular granular-phi normalized-top1", "tp2", 2, tp=2),
    *_layouts("granular granular-phi normalized-top1", "pp2", 2, pp=2),
    *_layouts("granular", "tp2-etp2", 2, tp=2, etp=2),
    *_layouts("mixtral qwen2-moe olmoe dots1 qwen2-moe-stage1", "ep2", 2, ep=2),
    *_layouts("qwen2-moe olmoe olmoe-padded dots1 deepseek-moe", "tp2", 2, tp=2),
    *_layouts("qwen2-moe olmoe dots1 qwen2-moe-stage1", "pp2", 2, pp=2),
    *_layouts("mixtral qwen2-moe olmoe deepseek-moe", "tp2-etp2", 2, tp=2, etp=2),
    *_layouts("qwen2-moe olmoe dots1", "cp2", 2, cp=2),
    *_layouts("deepseek-v2 deepseek-v3", "ep2", 2, ep=2),
    *_layouts("deepseek-v2 deepseek-v3 deepseek-v3-padded lora-mla", "tp2", 2, tp=2),
    *_layouts("deepseek-v3 deepseek-v3-stage3 lora-mla", "pp2", 2, pp=2),
    *_layouts("deepseek-v2 deepseek-v3", "cp2", 2, cp=2),
    *_layouts("deepseek-v3", "tp2-etp2", 2, tp=2, etp=2),
    *_layouts("deepseek-v3", "recompute-full", 1, recompute="full"),
    *_layouts("deepseek-v3", "recompute-selective", 1, recompute="selective"),
    *_layouts("deepseek-v3", "tp2-recompute-moe", 2, tp=2, recompute="moe"),
    *_layouts("fp16", "dp2", 2),
    *_layouts("fp16", "tp2", 2, tp=2),
    *_layouts("fp16", "pp2", 2, pp=2),
    *_layouts("fp16", "ep2", 2, ep=2),
    *_layouts("bf16-params", "dp2", 2),
    *_layouts("bf16-params", "pp2", 2, pp=2),
    *_layouts("granular", "dp2", 2),
    *_layouts("compiled", "tp2-ep2-etp1", 2, tp=2, ep=2),
    *_layouts("compiled", "pp2", 2, pp=2),
    *_layouts("compiled", "recompute-moe-act", 1, recompute="moe_act"),
    *_layouts("average", "dp2", 2),
    *_layouts("average", "tp2-etp2", 2, tp=2, etp=2),
    *_layouts("average", "pp2", 2, pp=2),
    *_layouts("average", "ep2-overlap", 2, ep=2, overlap_grads=True, overlap_params=True),
    *_layouts("rates", "dp2", 2),
    *_layouts("rates", "tp2-etp2", 2, tp=2, etp=2),
    *_layouts("rates", "pp2", 2, pp=2),
    *_layouts("rates", "ep2", 2, ep=2),
    *_layouts("cumo cumo-moe cumo-bias cumo-stage3 cumo-stage1", "dp2", 2),
    *_layouts("cumo cumo-moe cumo-bias cumo-stage3 cumo-stage1 cumo-native cumo-newline", "tp2", 2, tp=2),
    *_layouts("cumo cumo-moe cumo-bias cumo-stage1", "pp2", 2, pp=2),
    *_layouts("cumo cumo-moe cumo-bias cumo-stage3 cumo-stage1 cumo-native cumo-newline", "ep2", 2, ep=2),
    *_layouts("cumo cumo-moe cumo-stage3 cumo-native cumo-newline", "cp2", 2, cp=2),
    *_layouts("cumo cumo-moe cumo-native", "tp2-ep2-etp1", 2, tp=2, ep=2),
    *_layouts("cumo", "cp2-ep2", 2, cp=2, ep=2),
    *_layouts("cumo cumo-native", "recompute-tower", 1, recompute_tower=True),
    *_layouts("cumo-stage3", "ep2-overlap", 2, ep=2, overlap_grads=True, overlap_params=True),
    # global_aux_loss under data parallelism sees more rows at once: tests/distributed/test_balancing.py
    *_layouts("sequence-aux-loss global-aux-loss first-half", "pp2", 2, pp=2),
    *_layouts("global-aux-loss", "tp2", 2, tp=2),
    *_layouts("global-aux-loss", "cp2", 2, cp=2),
    *_layouts("global-aux-loss", "recompute-full", 1, recompute="full"),
    *_layouts("capacity", "ep2", 2, ep=2),
    *_layouts("capacity", "pp2", 2, pp=2),
    *_layouts("by-modality by-modality-bias", "dp2", 2),
    *_layouts("by-modality by-modality-bias by-modality-capacity", "ep2", 2, ep=2),
    *_layouts("by-modality by-modality-bias balance-per-modality", "tp2", 2, tp=2),
    *_layouts("by-modality by-modality-bias by-modality-capacity balance-per-modality", "pp2", 2, pp=2),
    *_layouts("by-modality by-modality-bias balance-per-modality", "cp2", 2, cp=2),
    *_layouts("by-modality", "tp2-ep2-recompute-full", 2, tp=2, ep=2, recompute="full"),
    *_layouts("by-modality by-modality-bias", "recompute-moe", 1, recompute="moe"),
    *_layouts("by-modality", "pp2-vpp2", 2, pp=2, vpp=2),
    *_layouts("experts-only attention-only", "recompute-full", 1, recompute="full"),
    *_layouts("experts-only attention-only", "recompute-moe", 1, recompute="moe"),
    *_layouts("experts-only attention-only", "pp2-recompute-full", 2, pp=2, recompute="full"),
    *_layouts("experts-only attention-only", "tp2-ep2-recompute-full", 2, tp=2, ep=2, recompute="full"),
    *_layouts("experts-only", "ep2-recompute-full-overlap", 2, ep=2, recompute="full", overlap_grads=True, overlap_params=True),
    *_layouts("experts-only", "cp2-recompute-full", 2, cp=2, recompute="full"),
    *_layouts("original original-phi original-top1", "ep2", 2, ep=2),
    *_layouts("original original-phi original-top1 original-noise", "tp2-ep2-etp1", 2, tp=2, ep=2),
    *_layouts("original original-noise", "pp2", 2, pp=2),
    *_layouts("llama phi llama-stage1 llama-stage3 text-only tied-dense", "cp2", 2, cp=2),
    *_layouts("padded padded-phi router-losses sequence-aux-loss shared-experts expert-bias residual", "cp2", 2, cp=2),
    *_layouts("llama phi", "cp2-ep2", 2, cp=2, ep=2),
    *_layouts("llama", "cp2-recompute-full", 2, cp=2, recompute="full"),
    *_layouts("llama", "cp2-overlap", 2, cp=2, overlap_grads=True, overlap_params=True),
    *_layouts("bf16 bf16-phi bf16-cumo", "ep2", 2, ep=2),
    *_layouts("bf16 bf16-phi bf16-cumo", "tp2", 2, tp=2),
    *_layouts("bf16", "pp2", 2, pp=2),
    *_layouts("bf16", "cp2", 2, cp=2),
    *_layouts("fp8-tensorwise fp8-delayed fp8-blockwise fp8-mxfp8", "pp2", 2, pp=2),
    *_layouts("fp8-tensorwise fp8-mxfp8", "tp2-ep2-etp1", 2, tp=2, ep=2),
    *_layouts("fp8-blockwise", "ep2-recompute-full", 2, ep=2, recompute="full"),
    *_layouts("fp8-delayed", "recompute-full", 1, recompute="full"),
    *_layouts("lora", "sequential", 1, grouped=False),
    *_layouts("lora", "recompute-full", 1, recompute="full"),
    *_layouts("lora", "recompute-moe-tower", 1, recompute="moe", recompute_tower=True),
    *_layouts("lora lora-phi lora-dense", "tp2", 2, tp=2),
    *_layouts("lora lora-phi lora-dense", "pp2", 2, pp=2),
    *_layouts("lora lora-phi lora-shared", "ep2", 2, ep=2),
    *_layouts("lora lora-shared", "tp2-etp2", 2, tp=2, etp=2),
    *_layouts("lora lora-shared", "tp2-ep2-etp1", 2, tp=2, ep=2),
    *_layouts("lora lora-dense", "cp2", 2, cp=2),
    *_layouts("lora", "pp2-vpp2", 2, pp=2, vpp=2),
    *_layouts("lora lora-shared", "ep2-overlap", 2, ep=2, overlap_grads=True, overlap_params=True),
    *_layouts("lora-shared", "dp2", 2),
    # four processes
    *_layouts("lora lora-shared", "tp2-ep2-etp2", 4, tp=2, ep=2, etp=2),
    *_layouts("lora", "cp2-tp2-ep2", 4, cp=2, tp=2, ep=2),
    *_layouts("llama", "dp4", 4),
    *_layouts("llama phi", "ep4", 4, ep=4),
    *_layouts("llama", "tp4", 4, tp=4),
    *_layouts("llama", "dp2-ep2-tp2", 4, tp=2, ep=2),
    *_layouts("llama phi", "pp2-ep2", 4, pp=2, ep=2),
    *_layouts("llama", "pp2-tp2", 4, pp=2, tp=2),
    *_layouts("llama", "tp2-ep2-etp2", 4, tp=2, ep=2, etp=2),
    *_layouts("llama", "pp2-vpp2-tp2-ep2", 4, pp=2, vpp=2, tp=2, ep=2),
    *_layouts("llama phi", "cp2-tp2-ep2", 4, cp=2, tp=2, ep=2),
    *_layouts("llama llama-stage1 tied", "cp2-pp2", 4, cp=2, pp=2),
    *_layouts("llama", "cp4-ep2", 4, cp=4, ep=2),
    *_layouts("cumo-moe", "cp2-tp2-ep2", 4, cp=2, tp=2, ep=2),
    *_layouts("cumo", "pp2-ep2", 4, pp=2, ep=2),
    *_layouts("llama", "dp2-cp2-ep4", 4, cp=2, ep=4),
    *_layouts("padded router-losses", "cp2-tp2", 4, cp=2, tp=2),
    *_layouts("first-half global-aux-loss", "pp2-tp2", 4, pp=2, tp=2),
    *_layouts("first-half", "cp2-pp2", 4, cp=2, pp=2),
    *_layouts("tied", "pp2-tp2", 4, pp=2, tp=2),
    *_layouts("llama-stage1", "pp2-tp2", 4, pp=2, tp=2),
    *_layouts("llama-stage3", "pp2-ep2", 4, pp=2, ep=2),
    *_layouts("original", "pp2-tp2", 4, pp=2, tp=2),
]  # fmt: skip
# Eight processes: `make test-layouts-8`.
SLOW_LAYOUTS = [
    *_layouts("llama phi tied", "pp2-tp2-ep2", 8, pp=2, tp=2, ep=2),
    *_layouts("llama", "tp2-ep4", 8, tp=2, ep=4),
    *_layouts("llama tied", "cp2-pp2-tp2-ep2", 8, cp=2, pp=2, tp=2, ep=2),
    *_layouts("llama", "pp2-vpp2-tp2-ep4", 8, pp=2, vpp=2, tp=2, ep=4),
    *_layouts("llama", "pp2-tp2-ep2-etp2", 8, pp=2, tp=2, ep=2, etp=2),
    *_layouts("llama", "tp4-ep2-overlap", 8, tp=4, ep=2, overlap_grads=True, overlap_params=True),
    *_layouts("llama", "pp4-ep2-recompute-full", 8, pp=4, ep=2, recompute="full"),
    *_layouts("llama-stage1", "pp4-tp2", 8, pp=4, tp=2),
    *_layouts("llama-stage3", "pp2-vpp2-tp2-ep2", 8, pp=2, vpp=2, tp=2, ep=2),
    *_layouts("original", "pp2-tp2-ep2", 8, pp=2, tp=2, ep=2),
    *_layouts("bf16", "pp2-tp2-ep2", 8, pp=2, tp=2, ep=2),
]
MUON_LAYOUTS = [
    *_layouts("muon muon-phi muon-bf16", "dp2", 2),
    *_layouts("muon", "tp2-etp2", 2, tp=2, etp=2),
    *_layouts("muon", "tp2-ep2-etp1", 2, tp=2, ep=2),
    *_layouts("muon muon-bf16", "ep2", 2, ep=2),
    *_layouts("muon", "pp2-vpp2", 2, pp=2, vpp=2),
    *_layouts("muon-stage1 muon-stage3", "pp2", 2, pp=2),  # stage 1: the second rank trains nothing
    *_layouts("muon", "cp2-overlap-grads", 2, cp=2, overlap_grads=True),
    *_layouts("muon", "dp2-tp2-ep2", 4, tp=2, ep=2),
]
BY_ID = {layout.id: layout for layout in [*REFERENCES.values(), *LAYOUTS, *SLOW_LAYOUTS, *MUON_LAYOUTS]}

# (checkpoint of, continued as): weights and Adam's state must arrive whatever both layouts are.
CONTINUATIONS = [
    ("llama:one", "llama:dp2"),
    ("llama:one", "llama:pp2-vpp2"),
    ("llama:dp2", "llama:one"),
    ("llama:dp2-overlap", "llama:one"),
    ("llama:tp2", "llama:ep2"),
    ("llama:ep2", "llama:tp2"),
    ("llama:ep2", "llama:ep2"),
    ("llama:ep2-sequential", "llama:tp2-etp2"),
    ("llama:tp2-ep2-etp1", "llama:pp2"),
    ("llama:pp2", "llama:sequential"),
    ("llama:pp2-1-3", "llama:tp2"),
    ("llama:cp2-ep2", "llama:tp2"),
    ("llama:tp2", "llama:cp2-ep2"),
    ("llama:pp2-vpp2", "llama:tp2"),
    ("phi:ep2-sequential", "phi:one"),
    ("phi:pp2-vpp2", "phi:tp2-ep2-etp1"),
    ("tied:pp2", "tied:one"),
    ("tied:tp2-ep2-etp1", "tied:pp2"),
    ("llama-stage1:pp2", "llama-stage1:dp2"),
    ("llama-stage1:tp2", "llama-stage1:pp2"),
    ("llama-stage3:ep2", "llama-stage3:pp2-vpp2"),
    ("shared-experts:tp2", "shared-experts:ep2"),
    ("qwen2-moe:tp2", "qwen2-moe:pp2"),
    ("olmoe:tp2", "olmoe:ep2"),
    ("deepseek-v3:tp2", "deepseek-v3:pp2"),
    ("expert-bias:ep2", "expert-bias:tp2"),
    ("residual:tp2", "residual:pp2"),
    ("cumo:tp2-ep2-etp1", "cumo:pp2"),
    ("cumo:ep2", "cumo:dp2"),
    ("cumo-bias:ep2", "cumo-bias:tp2"),
    ("rates:ep2", "rates:pp2"),
    ("average:ep2-overlap", "average:tp2-etp2"),
    ("average:pp2", "average:dp2"),
    ("own-tower:tp2", "own-tower:pp2"),
    ("own-tower:ep2", "own-tower:cp2"),
    ("own-tower-stage1:pp2", "own-tower-stage1:tp2"),
    ("own-tower-lora:tp2", "own-tower-lora:pp2"),
    ("across-frames:tp2", "across-frames:pp2"),
    ("lora:ep2", "lora:tp2-etp2"),
    ("lora:tp2-etp2", "lora:pp2"),
    ("lora-shared:tp2-ep2-etp1", "lora-shared:ep2"),
    ("llama:tp2-ep2-etp2", "llama:pp2-ep2"),
    ("llama:pp2-vpp2-tp2-ep2", "llama:ep4"),
]
MUON_CONTINUATIONS = [
    ("muon:one", "muon:dp2"),
    ("muon:ep2", "muon:tp2-etp2"),
    ("muon:tp2-etp2", "muon:pp2-vpp2"),
    ("muon:dp2", "muon:one"),
    ("muon-stage1:pp2", "muon-stage1:one"),
]
SOURCES = {source for source, _ in [*CONTINUATIONS, *MUON_CONTINUATIONS]} | {"llama-dense:one", "llama:one"}
