"""What `checkpoint.place_experts` needs: experts on several ranks, a log of their loads, and a checkpoint to move them in."""

from collections.abc import Iterator

from megatron_moellava.config import RunConfig


def expert_place_problems(run: RunConfig) -> Iterator[str]:
    """Of a run, without looking at files."""
    checkpoint, interval = run.checkpoint, run.logging.routing_interval
    if checkpoint.place_experts is None:
        return
    given = f"checkpoint.place_experts={checkpoint.place_experts}"
    if run.moe is None:
        yield f"{given}: the language model is dense, so no expert could change its place; leave it out"
    elif run.parallel.expert_model_parallel_size == 1:
        yield f"{given} with parallel.expert_model_parallel_size=1: one rank holds all experts, which is level; leave it out"
    if checkpoint.save is None:
        yield f"{given}: experts change places by a checkpoint, and checkpoint.save is not set; set it too"
    if checkpoint.async_save:
        yield f"{given} with checkpoint.async_save=true: the run would go on before experts have moved; drop one of the two"
    if 2 * interval > checkpoint.save_interval:
        yield (
            f"{given}: loads are observed every logging.routing_interval={interval} steps, and a checkpoint every "
            f"checkpoint.save_interval={checkpoint.save_interval} may have fewer than two new observations, one to find places "
            "by and one to judge them by; lower the former to half of that at most"
        )
    if run.training.lora is not None:
        yield f"{given} with training.lora: the experts lie in the adapter's base, which is not written; leave it out"
    if run.training.fp8_recipe == "delayed":
        yield (
            f"{given} with training.fp8_recipe=delayed, which keeps histories of every expert by rank; use another recipe, or "
            "leave it out"
        )
