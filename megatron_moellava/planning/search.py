"""Every layout that the run's own validation accepts, with its memory and its costs, best first."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_moellava.backbones import Backbone
from megatron_moellava.config import RunConfig
from megatron_moellava.costs.expert_traffic import busiest_rank
from megatron_moellava.costs.gpus import Gpu
from megatron_moellava.costs.layout import Layout
from megatron_moellava.planning.hardware import IMBALANCE
from megatron_moellava.planning.memory import Memory, worst_memory
from megatron_moellava.planning.pricing import Costs, Pricing, costs_of
from megatron_moellava.planning.workload import StageData, mean_load
from megatron_moellava.towers import Tower
from megatron_moellava.validation.run import layout_problems

POWERS = tuple(2**power for power in range(11))
RECOMPUTE = ("none", "moe_act", "moe", "full")  # `selective` keeps what flash attention keeps anyway
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
VIRTUAL = (None, 2, 4)
INDISTINCT = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One layout with its predictions."""

    layout: Layout
    memory: Memory
    costs: Costs

    @property
    def settings(self) -> dict[str, object]:
        """The fields that the planner chose, as moellava train takes them."""
        parallel, training = self.layout.run.parallel, self.layout.run.training
        chosen: dict[str, object] = {
            "parallel.tensor_model_parallel_size": parallel.tensor_model_parallel_size,
            "parallel.pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "parallel.expert_model_parallel_size": parallel.expert_model_parallel_size,
            "training.micro_batch_size": training.micro_batch_size,
            "training.global_batch_size": training.global_batch_size,
            "training.recompute": training.recompute,
        }
        if parallel.virtual_pipeline_model_parallel_size:
            chosen["parallel.virtual_pipeline_model_parallel_size"] = parallel.virtual_pipeline_model_parallel_size
        if parallel.pipeline_split == "cost":
            chosen["parallel.pipeline_split"] = "cost"
        return chosen


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is to be planned."""

    run: RunConfig
    backbone: Backbone
    tower: Tower
    gpu: Gpu
    world_size: int
    data: StageData
    fixed: frozenset[str] = frozenset()  # settings that the user has already chosen, as `section.field`
    imbalance: float = IMBALANCE
    memory_limit: float | None = None  # bytes; None: the GPU's

    @property
    def limit(self) -> float:
        """Bytes of one rank that a plan may use."""
        return self.memory_limit or self.gpu.memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The result of a search."""

    plans: list[Plan]  # fitting, cheapest first
    too_big: list[tuple[Memory, Layout]]  # valid but over the limit, smallest first
    refused: list[str]  # what validation says of the layouts nearest to the request, when nothing is valid
    tried: int


def search(request: Request) -> Found:
    """Enumerate, ask the run's validation, predict, sort."""
    plans: list[Plan] = []
    too_big: list[tuple[Memory, Layout]] = []
    refused: list[str] = []
    tried = 0
    for run in candidates(request):
        tried += 1
        problems = layout_problems(run, request.backbone, request.world_size)
        if problems:
            refused = refused or problems
            continue
        layout = Layout(run=run, backbone=request.backbone, tower=request.tower, world_size=request.world_size)
        if run.parallel.pipeline_split == "cost" and len(set(layout.stage_sizes)) == 1:
            continue  # the same as "even"
        memory = worst_memory(layout, imbalance=imbalance_of(request, layout))
        if memory.total > request.limit:
            too_big.append((memory, layout))
        else:
            plans.append(Plan(layout=layout, memory=memory, costs=stage_costs(request, layout)))
    plans = without_needless_recomputation(plans)
    plans = best_first(plans)
    too_big.sort(key=lambda item: item[0].total)
    return Found(plans=plans, too_big=too_big, refused=refused, tried=tried)


def best_first(plans: list[Plan]) -> list[Plan]:
    """By cost; but what lies within `INDISTINCT` of the cheapest no prediction can tell apart: there the simplest first."""
    cheapest = min((plan.costs.gpu_hours for plan in plans), default=0.0)

    def key(plan: Plan) -> tuple:
        layout, hours = plan.layout, plan.costs.gpu_hours
        if hours <= cheapest * (1 + INDISTINCT):
            return (0, layout.vp * layout.pp * layout.tp, layout.ep, round(hours / cheapest, 2), plan.memory.total)
        return (1, hours, plan.memory.total)

    return sorted(plans, key=key)


def imbalance_of(request: Request, layout: Layout) -> float:
    """Tokens of the busiest expert rank over the mean: what was asked for, times what experts by modality add to it."""
    moe, data = layout.run.moe, request.data
    if moe is None or moe.expert_groups is None:
        return request.imbalance
    visual = data.shown(layout.tower, layout.run.data).tokens
    return request.imbalance * busiest_rank(moe, layout.ep, visual / (data.text_tokens + visual))


def stage_costs(request: Request, layout: Layout) -> Costs:
    """Costs of the whole stage in one layout."""
    fp8 = layout.run.training.fp8_recipe is not None
    pricing = Pricing(gpu=request.gpu, imbalance=imbalance_of(request, layout) if layout.run.moe else 1.0, fp8=fp8)
    return costs_of(layout, pricing, mean_load(layout, request.data), samples=request.data.samples)


def candidates(request: Request) -> Iterator[RunConfig]:
    """Every combination worth asking validation about; what the user has set stays as it is."""
    axes = _axes(request)
    for path in axes.keys() & request.fixed:
        section, name = path.split(".")
        axes[path] = [getattr(getattr(request.run, section), name)]
    for values in itertools.product(*axes.values()):
        run = with_settings(request.run, dict(zip(axes, values, strict=True)))
        if run.parallel.pipeline_model_parallel_size > 1 or not _asks_for_pipeline(run):
            yield run


def _axes(request: Request) -> dict[str, Sequence[object]]:
    run, world = request.run, request.world_size
    experts = run.moe.num_moe_experts if run.moe else 1
    layers = min(request.backbone.num_layers, world)
    is_free = run.parallel.num_layers_in_first_pipeline_stage is None and run.parallel.pipeline_split == "even"
    return {
        "parallel.tensor_model_parallel_size": [n for n in POWERS if n <= min(request.gpu.gpus_per_node, world)],
        "parallel.pipeline_model_parallel_size": [n for n in range(1, layers + 1) if world % n == 0],
        "parallel.expert_model_parallel_size": [n for n in range(1, min(experts, world) + 1) if experts % n == 0],
        "parallel.virtual_pipeline_model_parallel_size": VIRTUAL,
        "parallel.pipeline_split": ("even", "cost") if is_free else (run.parallel.pipeline_split,),
        "training.micro_batch_size": [1] if run.data.packing else MICRO_BATCHES,
        "training.recompute": RECOMPUTE if run.moe else ("none", "full"),
    }


def _asks_for_pipeline(run: RunConfig) -> bool:
    return run.parallel.virtual_pipeline_model_parallel_size is not None or run.parallel.pipeline_split == "cost"


def with_settings(run: RunConfig, settings: dict[str, object]) -> RunConfig:
    """`run` with dotted fields replaced."""
    sections: dict[str, dict[str, object]] = {}
    for path, value in settings.items():
        section, name = path.split(".")
        sections.setdefault(section, {})[name] = value
    return replace(run, **{name: replace(getattr(run, name), **fields) for name, fields in sections.items()})


def without_needless_recomputation(plans: list[Plan]) -> list[Plan]:
    """Of plans that differ in `recompute` alone, the cheapest."""
    best: dict[tuple, Plan] = {}
    for plan in plans:
        key = tuple(value for path, value in plan.settings.items() if path != "training.recompute")
        if key not in best or plan.costs.step_seconds < best[key].costs.step_seconds:
            best[key] = plan
    return list(best.values())
