"""One picture of the best plans: where the memory of the fullest rank goes, and where the time of a step goes."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_moellava.config import ConfigError
from megatron_moellava.costs.gpus import GIB
from megatron_moellava.costs.layout import Layout
from megatron_moellava.planning.search import Plan

MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "working", "dispatch", "margin")


def time_parts(plan: Plan) -> dict[str, float]:
    """Seconds of a step; they sum to the step."""
    costs = plan.costs
    return {
        "compute": costs.compute_seconds,
        "tensor parallel": costs.tensor_seconds,
        "expert parallel": costs.expert_seconds,
        "pipeline": costs.pipeline_seconds,
        "bubble": costs.bubble * costs.step_seconds,
        "data parallel": costs.data_seconds,
        "optimizer": costs.optimizer_seconds,
    }


def label(layout: Layout) -> str:
    """TP1 PP2v2 EP4 DP32 mb1 recompute=full; "PP2 by cost": pipeline stages level in cost."""
    virtual = f"v{layout.vp}" if layout.vp > 1 else ""
    virtual += " by cost" if layout.run.parallel.pipeline_split == "cost" else ""
    training = layout.run.training
    experts = f"EP{layout.ep} " if layout.run.moe else ""
    size = f"mb{training.micro_batch_size}"
    return f"TP{layout.tp} PP{layout.pp}{virtual} {experts}DP{layout.dp} {size} recompute={training.recompute}"


def draw(plans: Sequence[Plan], limit: float, title: str, path: Path) -> None:
    """Write the picture of `plans`, the best on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (memory, seconds) = plt.subplots(1, 2, figsize=(13, 1.8 + 0.55 * len(plans)), sharey=True)
    _stack(memory, [{name: asdict(plan.memory)[name] / GIB for name in MEMORY_PARTS} for plan in plans])
    memory.axvline(limit / GIB, color="k", linestyle="--", linewidth=1)
    memory.set_xlabel("GiB on the fullest rank; dashed: the GPU's memory")
    _stack(seconds, [time_parts(plan) for plan in plans])
    seconds.set_xlabel("seconds per step")
    for row, plan in enumerate(plans):
        text = f" MFU {plan.costs.mfu:.0%}, {plan.costs.gpu_hours:,.1f} GPU-hours"
        seconds.text(plan.costs.step_seconds, row, text, va="center", fontsize=8)
    seconds.set_xlim(right=1.45 * max(plan.costs.step_seconds for plan in plans))
    memory.set_yticks(range(len(plans)), [label(plan.layout) for plan in plans], fontsize=8)
    memory.invert_yaxis()
    figure.suptitle(f"{title} - predicted, never measured on a GPU")
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:  # of a file type that matplotlib does not write
        raise ConfigError(f"--picture {path}: {error}") from None
    plt.close(figure)


def _stack(panel, rows: list[dict[str, float]]) -> None:
    left = [0.0] * len(rows)
    for name in rows[0]:
        values = [row[name] for row in rows]
        panel.barh(range(len(rows)), values, left=left, label=name, height=0.6)
        left = [start + value for start, value in zip(left, values, strict=True)]
    panel.legend(fontsize=7, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
