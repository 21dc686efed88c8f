"""What a checkpoint of each model would hold, as JSON: local modules, or Transformer Engine's in a process without a GPU.

  python tests/te/describe.py local|te OUT.json

Every model of CASES is built for every rank of every layout of LAYOUTS in this one process, on torch's fake process
group, and its sharded tensors are listed: key, whole shape, shape and place of this rank's part. In mode `te` torch says
that there is a GPU, so that the package chooses as it does on one; everything that would touch the device is put on the
CPU. No forward pass: that needs a GPU. The numbers of parameters by training role stand beside the tensors.
"""

import contextlib
import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

MOE = {"num_moe_experts": 4, "placement": "sparse"}
BLOCKS: dict[str, dict | None] = {
    "dense": None,
    "grouped": MOE,
    "sequential": MOE | {"moe_grouped_gemm": False},
    "shared": MOE | {"moe_shared_expert_intermediate_size": 64},
    "residual": MOE | {"use_residual": True},
    "original": MOE | {"router": "original", "moe_expert_capacity_factor": 1.5},
}
LAYOUTS: dict[str, tuple[int, dict]] = {  # name: (processes, parallel.*)
    "one": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2 ep2": (2, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "etp2": (2, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
}
FP8 = ("delayed", "tensorwise", "blockwise", "mxfp8")
TOWERS = {"clip-tiny": "llama-tiny", "siglip-tiny": "qwen2-tiny"}  # tower: backbone that it is tried with


def pretend_gpu() -> None:
    """The few answers that make the package and Transformer Engine build a GPU's modules on the CPU."""
    cpu = torch.device("cpu")
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: cpu
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: type(
        "H100", (), {"multi_processor_count": 132, "major": 9, "minor": 0}
    )
    torch.cuda.Stream = lambda *_, **__: None
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.set_device = torch.cuda.manual_seed = torch.cuda.manual_seed_all = lambda *_: None
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda *_: None
    torch.cuda._lazy_call = lambda *_, **__: None


class OnCpu(torch.overrides.TorchFunctionMode):
    """Whoever asks for the GPU gets the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if function is torch.Tensor.cuda:
            return args[0]
        return function(*args, **kwargs)


def fake_groups() -> None:
    """Megatron-Core asks for gloo groups beside the default ones; they are to be fake, too."""
    new_group = dist.new_group
    dist.new_group = lambda *arguments, **options: new_group(*arguments, **{**options, "backend": "fake"})


def finish_pretending() -> None:
    """What can only be replaced after the imports."""
    from megatron_moellava import platform

    from megatron.core.tensor_parallel import random

    assert platform.HAS_TRANSFORMER_ENGINE
    OnCpu().__enter__()
    platform.device = lambda: torch.device("cpu")
    for tracker in (random.CudaRNGStatesTracker, random.get_cuda_rng_tracker().__class__):
        tracker.fork = lambda self, name="": contextlib.nullcontext()


def backbones() -> list[str]:
    from megatron_moellava.backbones import BACKBONES

    return [name for name in BACKBONES if name.endswith("-tiny")]


def cases() -> dict[str, tuple[str, ...]]:
    """id: (backbone, tower, block, layout[, FP8 recipe]). All blocks in one process; every layout for three of them."""
    made = {}
    for backbone in backbones():
        for block in BLOCKS:
            made[f"{backbone}, {block}"] = (backbone, "clip-tiny", block, "one")
        for layout in LAYOUTS:
            for block in ("dense", "grouped", "sequential"):
                made[f"{backbone}, {block}, {layout}"] = (backbone, "clip-tiny", block, layout)
    for recipe in FP8:
        for block in ("grouped", "sequential"):
            made[f"llama-tiny, {block}, {recipe}"] = ("llama-tiny", "clip-tiny", block, "one", recipe)
    for tower, backbone in TOWERS.items():
        made[f"{tower}"] = (backbone, tower, "dense", "one")
    return made


def describe(backbone: str, tower: str, block: str, layout: str, recipe: str | None = None) -> dict:
    """{key: [whole shape, places of the parts over all ranks]} and roles of each rank, or {"refused": message}."""
    processes, axes = LAYOUTS[layout]
    run = run_config(backbone, tower, block, axes, recipe)
    found: dict[str, list] = {}
    roles: list[dict] = []
    for rank in range(processes):
        try:
            parts = sharded(run, rank, processes, roles)
        except (AssertionError, ValueError) as error:
            return {"refused": str(error)}
        for item in parts:
            whole, places = found.setdefault(item.key, [list(item.global_shape), []])
            assert whole == list(item.global_shape), item
            place = [list(item.local_shape), list(item.global_offset), str(item.dtype)]
            if place not in places:
                places.append(place)
    for _, places in found.values():
        places.sort()
    return {**found, "roles": roles}


def run_config(backbone: str, tower: str, block: str, axes: dict, recipe: str | None):
    from megatron_moellava.config import RunConfig, from_dict

    training = {"stage": 3, "precision": "bf16"} | ({"fp8_recipe": recipe} if recipe else {})
    tree = {"model": {"backbone": backbone, "tower": tower}, "training": training, "parallel": axes}
    return from_dict(RunConfig, tree | ({"moe": BLOCKS[block]} if BLOCKS[block] else {}))


def sharded(run, rank: int, processes: int, roles: list) -> list:
    """This rank's sharded tensors; its parameters by role are appended to `roles`."""
    from megatron_moellava import parallel
    from megatron_moellava.model.build import build_model
    from megatron_moellava.model.roles import parameter_roles
    from megatron_moellava.model.weights import model_state

    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories

    dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    try:
        parallel.initialize(run.parallel, 1)
        chunks = build_model(run)
        counts = Counter()
        for role, _, parameter in parameter_roles(chunks[0]):
            counts[role] += parameter.numel()
        roles.append(dict(sorted(counts.items())))
        state = model_state(chunks)
        apply_factories(state)
        items = list(nested_values(state))
        objects = [item.key for item in items if isinstance(item, ShardedObject)]
        assert not objects, f"objects in a checkpoint: {objects}"
        return items
    finally:
        parallel.shutdown()


def main() -> None:
    mode, out = sys.argv[1:]
    if mode == "te":
        pretend_gpu()
    fake_groups()
    import megatron_moellava.platform as platform

    if mode == "te":
        finish_pretending()
    assert (mode == "te") is platform.HAS_TRANSFORMER_ENGINE
    Path(out).write_text(json.dumps({name: describe(*case) for name, case in cases().items()}))


if __name__ == "__main__":
    main()
