"""Bytes that a process sends in one training step, per axis, counted in real gloo runs, beside what theory says.

  python -m benchmarks.communication

Every layout runs a stage-2 step (MoE: stage 3) in 2 or 4 processes. torch.distributed's collectives are wrapped; a call
counts what a ring sends from each of its n processes: reduce-scatter, all-gather and all-to-all of a tensor of M bytes
M (n-1)/n (all-to-all: what really goes to others), all-reduce twice that, broadcast and send M on the sender. Means over
the processes. `theory` is computed from the sizes of model and batch alone, `control` is whatever is below 8 kB in a call:
counts, losses, norms, flags.
"""

import functools
import inspect
import json
from collections import defaultdict
from pathlib import Path

from benchmarks.measure import finish, say
from benchmarks.processes import in_processes

CONTROL = 8192  # bytes
HIDDEN, LAYERS, FFN, SAMPLES = 256, 4, 704, 8
BINNED = {"expert_groups": {"image": 2, "text": 2}}  # each rank of two has the experts of one modality
# Every layer of the tower and the projector has experts, too; stage 3 trains the projector's, and these roles the tower's.
VISION = {"vision": {"tower_moe": {}, "projector_moe": {}}}
ALL_EXPERTS = VISION | {"trains": ["tower", "projector", "experts", "router"]}
# name: (processes, MoE, parallel.*), and what else `run_config` takes
LAYOUTS: dict[str, tuple[int, bool | dict, dict] | tuple[int, bool | dict, dict, dict]] = {
    "DP2": (2, False, {}),
    "TP2 (sequence parallel)": (2, False, {"tensor_model_parallel_size": 2}),
    "PP2": (2, False, {"pipeline_model_parallel_size": 2}),
    "EP2": (2, True, {"expert_model_parallel_size": 2}),
    "EP2, experts by modality": (2, BINNED, {"expert_model_parallel_size": 2}),
    "EP2, experts of tower and projector": (2, True, {"expert_model_parallel_size": 2}, VISION),
    "EP2, the same, tower trained": (2, True, {"expert_model_parallel_size": 2}, ALL_EXPERTS),
    "DP2 x TP2": (4, False, {"tensor_model_parallel_size": 2}),
    "TP2 x PP2": (4, False, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "DP4, EP2": (4, True, {"expert_model_parallel_size": 2}),
}


def ring(size: int, count: float) -> float:
    """What each of `size` processes sends of a tensor of `count` bytes that is gathered, scattered or exchanged."""
    return count * (size - 1) / size


def to_others(size: int, call: dict) -> float:
    """All-to-all: the rows that do not stay."""
    splits = call.get("input_split_sizes")
    if splits is None or not len(splits):
        return ring(size, call["input"].nbytes)
    return call["input"].nbytes * (1 - splits[call["rank"]] / max(sum(splits), 1))


SENT = {  # function of torch.distributed -> bytes that this process sends, from the names of its arguments
    "all_reduce": lambda size, call: 2 * ring(size, call["tensor"].nbytes),
    "reduce_scatter_tensor": lambda size, call: ring(size, call["input"].nbytes),
    "reduce_scatter": lambda size, call: ring(size, sum(part.nbytes for part in call["input_list"])),
    "all_gather_into_tensor": lambda size, call: ring(size, size * call["input_tensor"].nbytes),
    "all_gather": lambda size, call: ring(size, size * call["tensor"].nbytes),
    "all_to_all_single": to_others,
    "broadcast": lambda size, call: call["tensor"].nbytes if call.get("src") == call["global_rank"] else 0,
    "send": lambda size, call: call["tensor"].nbytes,
    "isend": lambda size, call: call["tensor"].nbytes,
}

# Only batches are broadcast, some of them over the tensor-parallel group; a pipeline of two sends over the world's group.
ALWAYS = {"broadcast": "batch", "send": "PP", "isend": "PP"}


class Counter:
    """Wraps torch.distributed. Must come before megatron.core is imported, which keeps some functions under own names."""

    def __init__(self):
        import torch.distributed as dist

        self.dist, self.bytes, self.counting = dist, defaultdict(float), False
        for name, sent in SENT.items():
            setattr(dist, name, self._wrapped(name, getattr(dist, name), sent))

    def _wrapped(self, name: str, function, sent):
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*arguments, **options):
            if self.counting:
                named = dict(signature.bind(*arguments, **options).arguments)
                group = named.get("group")
                size = self.dist.get_world_size(group)
                if size > 1:
                    named |= {"rank": self.dist.get_rank(group), "global_rank": self.dist.get_rank()}
                    count = sent(size, named)
                    self.bytes["control" if count < CONTROL else ALWAYS.get(name, self.axis(group))] += count
            return function(*arguments, **options)

        return call

    def axis(self, group) -> str:
        return next((name for name, value in self.axes.items() if group is value), "other groups")

    def know(self) -> None:
        """The groups of the layout by axis."""
        from megatron.core import parallel_state as state

        self.axes = {
            "DP": state.get_data_parallel_group(with_context_parallel=True),
            "DP of experts": state.get_expert_data_parallel_group(),
            "TP": state.get_tensor_model_parallel_group(),
            "PP": state.get_pipeline_model_parallel_group(),
            "EP": state.get_expert_model_parallel_group(),
        }


def misplaced(rows: list) -> float:
    """Share of the tokens that are on the other of two ranks than their experts: text and padding on the first, which has
    the image experts, and visual tokens on the second."""
    import torch

    from megatron_moellava.data.encode import IMAGE_TOKEN

    first, second = (torch.cat([row.tokens_BS for row in rows[rank::2]]) == IMAGE_TOKEN for rank in (0, 1))
    return float(torch.cat([~first, second]).float().mean())


def theory(
    layout: str,
    parameters: dict[str, float],
    microbatches: int,
    images: float,
    scale,
    leaves: float | None = None,
    vision: float = 0.0,
) -> dict[str, float]:
    """Bytes that a process sends per step and axis. bf16 activations and parameters, fp32 gradients.

    `parameters`: trained ones of a process, dense and expert; `microbatches` of a process; `images` of a micro-batch;
    `leaves`: share of the tokens whose experts are on another rank, where it does not follow from an even router; `vision`:
    what a micro-batch hands out to the experts of tower and projector (`costs/exchange.py`).
    """
    processes, moe, axes, *_ = LAYOUTS[layout]
    tp = axes.get("tensor_model_parallel_size", 1)
    pp = axes.get("pipeline_model_parallel_size", 1)
    ep = axes.get("expert_model_parallel_size", 1)
    dp = processes // tp // pp
    hidden_state = 2 * scale.seq_length * HIDDEN  # bytes of one micro-batch's activations between two layers
    result = {}
    if dp > 1:  # reduce-scatter of gradients (4 bytes), all-gather of parameters (2 bytes)
        result["DP"] = (4 + 2) * parameters["dense"] * (dp - 1) / dp
    if moe and dp > ep:
        result["DP of experts"] = (4 + 2) * parameters["expert"] * (dp // ep - 1) / (dp // ep)
    if ep > 1:  # tokens there and back, forward and backward, and the weights (fp32) there, forward and backward
        rows = 2 * scale.seq_length
        layers = (LAYERS + 1) // 2
        result["EP"] = (
            layers * microbatches * rows * (4 * 2 * HIDDEN + 2 * 4) * ((ep - 1) / ep if leaves is None else leaves)
        ) + microbatches * vision * (ep - 1) / ep
    if pp > 1:  # every boundary once each way; the mean over the processes
        result["PP"] = 2 * (pp - 1) * microbatches * (hidden_state / tp) / pp
    if tp > 1:
        result["TP"] = microbatches * (tp - 1) / tp * tensor_parallel_bytes(hidden_state, images, scale, pp)
    return result


def handed_out(run, images: float) -> float:
    """Bytes that one micro-batch hands out to the experts of tower and projector, forward and backward."""
    from megatron_moellava.backbones import get_backbone
    from megatron_moellava.costs.exchange import vision_exchanges
    from megatron_moellava.costs.layout import Layout
    from megatron_moellava.towers import get_tower

    backbone, tower = get_backbone(run.model.backbone), get_tower(run.model.tower)
    layout = Layout(run=run, backbone=backbone, tower=tower, world_size=2)
    exchanges, element = list(vision_exchanges(layout, images)), layout.activation_bytes
    return sum(exchange.forward(element) + exchange.backward(element) for exchange in exchanges)


def tensor_parallel_bytes(hidden_state: float, images: float, scale, pp: int) -> float:
    """Of one micro-batch, mean over the pipeline's stages, before the factor (tp - 1) / tp.

    A decoder layer: attention and FFN each gather before and scatter after (forward), and backward the same the other way
    round plus one more gather of the input for the weights' gradient: 2 x 5. Embedding: an all-reduce forward (2), a
    gather backward (1). Output layer: gather, gather, scatter (3), and three all-reduces of a number per token (fp32) for
    the cross entropy. Tower (frozen, no sequence parallelism): two all-reduces per layer; projector: one.
    """
    from megatron_moellava.towers import get_tower

    tower = get_tower("bench")
    tokens = images * tower.num_positions
    visual = 2 * 2 * (2 * tokens * tower.hidden_size) * tower.num_used_layers
    projector = 2 * 2 * images * scale.features * HIDDEN
    cross_entropy = 3 * 2 * 4 * scale.seq_length
    return (10 * LAYERS * hidden_state + 6 * hidden_state + cross_entropy + visual + projector) / pp


# --- the processes ----------------------------------------------------------------------------------------------------


def work(names: list[str], out: Path) -> None:
    counter = Counter()
    import torch.distributed as dist
    from synthetic import QUARTER, make_samples, packed_rows, register_model, run_config, trainer_of

    from megatron_moellava import parallel

    register_model("bench", QUARTER, hidden=HIDDEN, layers=LAYERS, ffn=FFN)
    rows = packed_rows(make_samples(SAMPLES, QUARTER), QUARTER)[:4]
    for name in names:
        _, moe, layout, *more = LAYOUTS[name]
        run = run_config("bench", QUARTER, len(rows), moe=moe, layout=layout, **(more[0] if more else {}))
        trainer = trainer_of(run, rows)
        counter.know()
        trainer.step()
        counter.bytes.clear()
        counter.counting = True
        trainer.step()
        counter.counting = False
        mine = {
            "bytes": dict(counter.bytes),
            "dense": float(sum(p.numel() for p in trained(trainer) if getattr(p, "allreduce", True))),
            "expert": float(sum(p.numel() for p in trained(trainer) if not getattr(p, "allreduce", True))),
        }
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        if dist.get_rank() == 0:
            leaves = misplaced(rows) if moe is BINNED else None
            images = sum(len(row.pixel_values_NCHW) for row in rows) / len(rows)
            parameters = {key: sum(item[key] for item in everyone) / len(everyone) for key in ("dense", "expert")}
            axes = sorted({axis for item in everyone for axis in item["bytes"]})
            entry = {
                "counted": {
                    axis: sum(item["bytes"].get(axis, 0.0) for item in everyone) / len(everyone) for axis in axes
                },
                "theory": theory(
                    name, parameters, trainer.num_microbatches, images, QUARTER, leaves, handed_out(run, images)
                ),
            }
            (out / f"{name}.json").write_text(json.dumps(entry))
    parallel.shutdown()


def trained(trainer) -> list:
    return [p for chunk in trainer.chunks for p in chunk.parameters() if p.requires_grad]


def main() -> None:
    layouts = in_processes(__file__, __doc__, {name: count for name, (count, *_) in LAYOUTS.items()}, work)
    if layouts is None:
        return
    for name, entry in layouts.items():
        say(f"{name}: {entry}")
    finish({"hidden": HIDDEN, "layers": LAYERS, "ffn": FFN, "layouts": layouts})


if __name__ == "__main__":
    main()
