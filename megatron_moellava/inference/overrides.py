"""`section.field=value` of chat, serve, evaluate and analyze: what they honour, and where the rest is said.

One table: a field that is not in it changes nothing there, so it is refused instead of being passed over.
"""

from collections.abc import Sequence
from dataclasses import replace

from megatron_moellava.config import (
    ConfigError,
    MoEConfig,
    ParallelConfig,
    RunConfig,
    from_dict,
    set_override,
    split_override,
)
from megatron_moellava.routers import ROUTERS, admissible_experts

HONOURED = {
    "parallel": (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "num_layers_in_first_pipeline_stage",
        "pipeline_split",
        "context_parallel_size",  # only 1, which inference_layout says
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "distributed_timeout_minutes",
    ),
    "model": ("scale_multimodal_embeddings",),
    "moe": (
        "eval_capacity_factor",
        "min_capacity",
        "second_choice",
        "moe_router_dtype",
        "moe_router_topk",
        "moe_grouped_gemm",
        "moe_token_dispatcher_type",
    ),
    "training": ("seed", "device"),
    "data": (
        "image_aspect_ratio",
        "image_grid",
        "box_format",
        "video_frames",
        "video_fps",
        "video_times",
        "video_pooling",
        "max_image_tokens",
        "max_sample_image_tokens",
        "enlarge_images",
    ),
}
# What `analyze` takes besides: it makes whole rows of a data set, as training does.
OF_ROWS = (
    "label_mode",
    "seq_length",
    "max_sample_length",
    "length_counts",
    "long_samples",
    "max_images",
    "ignore_keys",
    "trust_paths",
)
ELSEWHERE = {
    "data.tokenizer": "use --tokenizer",
    "data.template": "use --template",
    "training.precision": "use --precision",
    "data.modalities": "the checkpoint has learned what its modalities show, and says it",
    "parallel.sequence_parallel": "one token at a time cannot be cut along the sequence",
    "parallel.virtual_pipeline_model_parallel_size": "generation has no interleaved pipeline",
    "moe.moe_expert_capacity_factor": "evaluation has moe.eval_capacity_factor, with moe.router=original",
}
ORIGINAL_ONLY = ("eval_capacity_factor", "min_capacity", "second_choice")


def parse_overrides(overrides: Sequence[str], *, rows: bool = False) -> dict[str, dict]:
    """{section: {field: value}} of the command line. `rows`: for an analysis, which makes rows of a data set.

    Raises ConfigError that lists every field that would change nothing, and every wrong value.
    """
    given: dict = {}
    for override in overrides:
        set_override(given, *split_override(override))
    needed = {"model": {"backbone": ""}, "training": {"stage": 2}}
    from_dict(RunConfig, {name: needed.get(name, {}) | given.get(name, {}) for name in needed.keys() | given.keys()})
    honoured = HONOURED | ({"data": HONOURED["data"] + OF_ROWS} if rows else {})
    refused = [
        f"{section}.{name}"
        for section, fields in given.items()
        for name in fields
        if name not in honoured.get(section, ())
    ]
    if refused:
        known = ", ".join(f"{section}.{name}" for section, names in honoured.items() for name in names)
        reasons = [f"{name} changes nothing here{_hint(name)}" for name in refused]
        raise ConfigError("\n".join([*reasons, f"what can be set: {known}"]))
    return given


def _hint(name: str) -> str:
    return f": {ELSEWHERE[name]}" if name in ELSEWHERE else ""


def layout_with(layout: ParallelConfig, given: dict[str, dict]) -> ParallelConfig:
    """A layout, changed by the overrides of section `parallel`."""
    return replace(layout, **given.get("parallel", {}))


def run_with(run: RunConfig, given: dict[str, dict]) -> RunConfig:
    """A checkpoint's run, changed by the overrides of the other sections. ConfigError where the run has no use for one."""
    moe = given.get("moe", {})
    if run.moe is not None:
        _check_moe(run.moe, moe)
    elif moe:
        raise ConfigError(f"moe.{next(iter(moe))}: the checkpoint is dense, so there is nothing to route")
    sections = {name: replace(getattr(run, name), **fields) for name, fields in given.items() if name != "parallel"}
    return replace(run, **sections)


def _check_moe(moe: MoEConfig, given: dict) -> None:
    """ConfigError for an override that the checkpoint's router has no use for, or cannot follow."""
    useless = [name for name in ORIGINAL_ONLY if name in given and not ROUTERS[moe.router].evaluates_with_capacity]
    if useless:
        raise ConfigError(
            f"moe.{useless[0]}: the checkpoint has moe.router={moe.router}, which is deterministic and drops nothing "
            "in evaluation; leave it out"
        )
    topk = given.get("moe_router_topk", 1)
    limit = min(ROUTERS[moe.router].max_topk or moe.num_moe_experts, *map(len, admissible_experts(moe)))
    if not 1 <= topk <= limit:
        raise ConfigError(f"moe.moe_router_topk={topk} must lie between 1 and {limit} with moe.router={moe.router}")
