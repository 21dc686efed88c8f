"""Published runs as data, and what the planner says of them. docs/measurements/planning.md shows the table.

Language-model benchmarks have no tower and no images; their MFU follows Megatron-LM's count of the time, which takes
attention above the diagonal as work. Layouts that a source does not give are assumptions, and say so.
"""

from dataclasses import dataclass, field, replace

from megatron_moellava.backbones import BACKBONES, Backbone
from megatron_moellava.config import (
    DataConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    Recompute,
    Role,
    RunConfig,
    Stage,
    TrainingConfig,
)
from megatron_moellava.costs.gpus import GPUS
from megatron_moellava.costs.layout import Layout
from megatron_moellava.costs.stage_work import model_flops
from megatron_moellava.planning.memory import worst_memory
from megatron_moellava.planning.pricing import Pricing, costs_of
from megatron_moellava.planning.workload import STAGE_DATA, StageData, full_load, mean_load
from megatron_moellava.stages import STAGES
from megatron_moellava.towers import TOWERS

MISTRAL = BACKBONES["mistral-7b-v0.1"]
QWEN2 = BACKBONES["qwen2-7b"]
MIXTRAL_8X7B = replace(MISTRAL, name="Mixtral 8x7B", vocab_size=32000)
MIXTRAL_8X22B = replace(
    MISTRAL,
    name="Mixtral 8x22B",
    num_layers=56,
    hidden_size=6144,
    ffn_hidden_size=16384,
    num_attention_heads=48,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=32768,
)
QWEN2_57B = replace(
    QWEN2,
    name="Qwen2-57B-A14B",
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=2560,
    num_attention_heads=28,
    num_query_groups=4,
    kv_channels=128,
    vocab_size=151936,
)
TOP2_OF_8 = MoEConfig(num_moe_experts=8, placement="dense")
TOP8_OF_64 = MoEConfig(
    num_moe_experts=64, moe_router_topk=8, placement="dense", moe_shared_expert_intermediate_size=20480
)
TOP2_OF_4 = MoEConfig(num_moe_experts=4)
PAPER = "arXiv 2504.14960"
ZOO = "Megatron-MoE-ModelZoo, runtime.conf and the Mixtral script"
LLAVA = "LLaVA's README"
MOE_LLAVA = "arXiv 2401.15947, ablations"


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One measured run. `unit`: "mfu" (share) or "hours"."""

    name: str
    source: str
    value: float
    unit: str
    backbone: Backbone
    gpu: str
    gpus: int
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    moe: MoEConfig | None = None
    stage: Stage = 2
    micro_batch_size: int = 1
    global_batch_size: int = 256
    seq_length: int = 4096
    data: StageData | None = None  # None: text rows of seq_length
    trains: tuple[Role, ...] | None = None
    recompute: Recompute = "none"
    calibrates: bool = False  # the efficiencies were fitted to it, so it checks nothing
    note: str = ""

    @property
    def layout(self) -> Layout:
        """The run under its published layout."""
        run = RunConfig(
            model=ModelConfig(backbone=self.backbone.name),
            moe=self.moe,
            training=TrainingConfig(
                stage=self.stage,
                micro_batch_size=self.micro_batch_size,
                global_batch_size=self.global_batch_size,
                recompute=self.recompute,
                trains=STAGES[2] if self.data is None else self.trains,
            ),
            data=DataConfig(seq_length=self.seq_length, packing=self.data is None),
            parallel=self.parallel,
        )
        tower = TOWERS["clip-vit-large-patch14-336"]
        return Layout(run=run, backbone=self.backbone, tower=tower, world_size=self.gpus)


def _llava(name: str, value: float, size: str, gpu: str, stage: Stage, batch: int, note: str = "") -> Published:
    return Published(
        name=f"LLaVA-1.5-{size} {name}",
        source=LLAVA,
        value=value,
        unit="hours",
        backbone=BACKBONES[f"vicuna-{size.lower()}-v1.5"],
        gpu=gpu,
        gpus=8,
        stage=stage,
        micro_batch_size=batch,
        global_batch_size=8 * batch,
        seq_length=2048,
        data=STAGE_DATA[1 if stage == 1 else 3],
        recompute="full",
        note=note,
    )


def _ablation(name: str, value: float, moe: MoEConfig | None, trains: tuple[Role, ...] | None = None) -> Published:
    return Published(
        name=f"MoE-LLaVA Qwen-1.8B stage 3, {name}",
        source=MOE_LLAVA,
        value=value,
        unit="hours",
        backbone=BACKBONES["qwen-1.8b"],
        gpu="v100-32",
        gpus=8,
        moe=moe,
        stage=3 if moe else 2,
        micro_batch_size=8,
        global_batch_size=128,
        seq_length=2048,
        data=STAGE_DATA[3],
        trains=trains,
        recompute="full",
        note="DeepSpeed, fp16, no flash attention",
    )


MIXTRAL_8X22B_ZOO = Published(
    name="Mixtral 8x22B, dropless",
    source=f"{ZOO} (455 TFLOP/s)",
    value=455 / 989,
    unit="mfu",
    backbone=MIXTRAL_8X22B,
    gpu="h100",
    gpus=128,
    parallel=ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=8, expert_model_parallel_size=8),
    moe=TOP2_OF_8,
)
RUNS = (
    Published(
        name="Mixtral 8x7B",
        source="Megatron-LM, MoE README (468 TFLOP/s)",
        value=468 / 989,
        unit="mfu",
        backbone=MIXTRAL_8X7B,
        gpu="h100",
        gpus=64,
        parallel=ParallelConfig(
            pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=8, expert_model_parallel_size=8
        ),
        moe=TOP2_OF_8,
        calibrates=True,
        note=f"layout: {ZOO}",
    ),
    MIXTRAL_8X22B_ZOO,
    replace(
        MIXTRAL_8X22B_ZOO,
        name="Mixtral 8x22B",
        source=PAPER,
        value=0.493,
        note="layout and batch assumed: those of the row above",
    ),
    Published(
        name="Qwen2-57B-A14B",
        source=PAPER,
        value=0.390,
        unit="mfu",
        backbone=QWEN2_57B,
        gpu="h100",
        gpus=64,
        parallel=ParallelConfig(
            tensor_model_parallel_size=2, pipeline_model_parallel_size=4, expert_model_parallel_size=4
        ),
        moe=TOP8_OF_64,
        note="layout and batch assumed",
    ),
    _llava("stage 1", 3.5, "7B", "a100-80", 1, 32),
    _llava("stage 1", 5.5, "13B", "a100-80", 1, 32),
    _llava("stage 2", 10.0, "7B", "a100-40", 2, 16, "40 GB cards, ZeRO-3"),
    _llava("stage 2", 20.0, "13B", "a100-80", 2, 16, "ZeRO-3"),
    _ablation("dense", 13.0, None),
    _ablation("FFN only", 20.0, TOP2_OF_4),
    _ablation("all parameters", 27.0, TOP2_OF_4, STAGES[2]),
    _ablation("experts in all layers", 32.0, replace(TOP2_OF_4, placement="dense")),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A published run beside its prediction."""

    run: Published
    predicted: float  # in the run's unit
    memory: float  # bytes on the fullest rank

    @property
    def off(self) -> float:
        """0.1: the prediction is a tenth above what was measured."""
        return self.predicted / self.run.value - 1


def check(run: Published) -> Check:
    """Predict a published run, with balanced routing."""
    layout, pricing = run.layout, Pricing(gpu=GPUS[run.gpu])
    if run.data is not None:
        costs = costs_of(layout, pricing, mean_load(layout, run.data), samples=run.data.samples)
        predicted = costs.hours
    else:
        load = full_load(layout)
        costs = costs_of(layout, pricing, load)
        predicted = costs.mfu * model_flops(layout, load, causal=1.0) / model_flops(layout, load)
    return Check(run=run, predicted=predicted, memory=worst_memory(layout, imbalance=1.0).total)


def check_all() -> list[Check]:
    """Every published run beside the planner's prediction."""
    return [check(run) for run in RUNS]


def recipe_hours(backbone: str, gpu: str = "a100-80") -> float:
    """The three stages of the original's recipe on 8 GPUs; the paper says "within 1 day" on A100 or A800."""
    total = 0.0
    batches: dict[Stage, int] = {1: 32, 2: 8, 3: 8}
    for stage, batch in batches.items():
        run = Published(
            name=backbone,
            source=MOE_LLAVA,
            value=24.0,
            unit="hours",
            backbone=BACKBONES[backbone],
            gpu=gpu,
            gpus=8,
            moe=TOP2_OF_4 if stage == 3 else None,
            stage=stage,
            micro_batch_size=batch,
            global_batch_size=STAGE_DATA[stage].global_batch_size,
            seq_length=2048,
            data=STAGE_DATA[stage],
            recompute="full",
        )
        total += check(run).predicted
    return total


def markdown_table() -> str:
    """The table of docs/measurements/planning.md."""
    lines = ["| run | on | measured | predicted | off | source |", "|---|---|---|---|---|---|"]
    for item in check_all():
        run = item.run
        shown = [f"{value:.1%} MFU" if run.unit == "mfu" else f"{value:.1f} h" for value in (run.value, item.predicted)]
        off = "fitted to it" if run.calibrates else f"{item.off:+.0%}"
        source = "; ".join(text for text in (run.source, run.note) if text)
        lines.append(f"| {run.name} | {run.gpus} {run.gpu} | {shown[0]} | {shown[1]} | {off} | {source} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
    print({name: round(recipe_hours(name), 1) for name in ("stablelm-2-1.6b", "qwen-1.8b", "phi-2")})
