"""Tokens per second of training layouts in 1, 2 and 4 gloo processes on this machine, and a plan's prediction for GPUs.

  python -m benchmarks.layouts

The measured part shows what the axes cost here, where 4 processes share the cores and everything goes through memory: it
says nothing about GPUs. The cost model of tools/plan.py is asked what layouts should reach on 8 to 512 H100s, and the
answer is stored as `prediction`.
"""

import json
from pathlib import Path

from benchmarks.measure import finish, median, say
from benchmarks.processes import in_processes

HIDDEN, LAYERS, FFN, SAMPLES = 384, 4, 1056, 16
STEPS = 5  # measured ones, after one that warms up
LAYOUTS: dict[str, tuple[int, dict]] = {  # name: (processes, parallel.*)
    "one process": (1, {}),
    "DP2": (2, {}),
    "DP2, EP2": (2, {"expert_model_parallel_size": 2}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "DP4": (4, {}),
    "DP4, EP4": (4, {"expert_model_parallel_size": 4}),
    "DP2 x TP2, EP2": (4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "TP2 x PP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
GPUS = (8, 16, 32, 64, 128, 256, 512)
PLANNED, PLANNED_ROWS = "stablelm-2-1.6b", 512  # so many rows that 512 data-parallel ranks have one each
EVEN = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": "null",
    "pipeline_split": "even",
}
PREDICTED: dict[str, dict | None] = {  # name: parallel.* beside EVEN; None: whatever the planner likes best
    "DP": {},
    "DP, EP2": {"expert_model_parallel_size": 2},
    "DP, EP4": {"expert_model_parallel_size": 4},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "TP2, EP2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "TP2 x PP2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "the planner's own choice": None,
}


def work(names: list[str], out: Path) -> None:
    import torch.distributed as dist
    from synthetic import QUARTER, make_samples, packed_rows, register_model, run_config, trainer_of

    from megatron_moellava import parallel

    register_model("bench", QUARTER, hidden=HIDDEN, layers=LAYERS, ffn=FFN)
    rows = packed_rows(make_samples(SAMPLES, QUARTER), QUARTER)
    rows = rows[: len(rows) // 4 * 4]
    for name in names:
        _, layout = LAYOUTS[name]
        trainer = trainer_of(run_config("bench", QUARTER, len(rows), moe=True, layout=layout), rows)
        speeds = [trainer.step()[0]["tokens_per_second"] for _ in range(STEPS + 1)][1:]
        if dist.get_rank() == 0:
            (out / f"{name}.json").write_text(json.dumps({"tokens per second": median(speeds)}))
    parallel.shutdown()


def prediction() -> dict:
    """What the planner says of layouts on H100s: {layout: {number of GPUs: its figures, or None where it is not valid}}."""
    return {
        "backbone": PLANNED,
        "rows per step": PLANNED_ROWS,
        "layouts": {name: {str(gpus): _predicted(gpus, axes) for gpus in GPUS} for name, axes in PREDICTED.items()},
    }


def _predicted(gpus: int, axes: dict | None) -> dict | None:
    from megatron_moellava.backbones import get_backbone
    from megatron_moellava.config import load_config
    from megatron_moellava.costs.gpus import GIB, get_gpu
    from megatron_moellava.planning.picture import label
    from megatron_moellava.planning.search import Request, search
    from megatron_moellava.planning.workload import STAGE_DATA
    from megatron_moellava.towers import get_tower

    given = {f"parallel.{name}": value for name, value in (EVEN | axes if axes is not None else {}).items()}
    stage = {"model.backbone": PLANNED, "training.stage": 3, "training.global_batch_size": PLANNED_ROWS}
    run = load_config(None, [f"{name}={value}" for name, value in (stage | {"moe.num_moe_experts": 4} | given).items()])
    request = Request(
        run=run,
        backbone=get_backbone(PLANNED),
        tower=get_tower(run.model.tower),
        gpu=get_gpu("h100"),
        world_size=gpus,
        data=STAGE_DATA[3],
        fixed=frozenset(given),
    )
    plans = search(request).plans
    if not plans:
        return None
    best = plans[0]
    return {
        "layout": label(best.layout),
        "tokens per second": best.costs.tokens_per_second,
        "MFU": best.costs.mfu,
        "GiB per rank": best.memory.total / GIB,
    }


def main() -> None:
    counts = {name: count for name, (count, _) in LAYOUTS.items()}
    found = in_processes(__file__, __doc__, counts, work)
    if found is None:
        return
    measured = {name: {"processes": counts[name], **entry} for name, entry in found.items()}
    say(str(measured))
    result = {"hidden": HIDDEN, "layers": LAYERS, "ffn": FFN, "experts": 4, "measured": measured}
    finish(result | {"prediction": prediction()})


if __name__ == "__main__":
    main()
