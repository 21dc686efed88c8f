"""Balancing and z losses of every type: value, gradient and logged number are what their definitions say, however the tokens
are spread over micro-batches and ranks, with padding or packed."""

import pytest

# Relative to the largest entry. Values are sums of a few hundred fp32 numbers; a gradient is the difference of two steps'.
VALUE, GRADIENT = 1e-5, 1e-4

KINDS = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")
GATES = {
    "softmax": {},
    "one choice": {"moe_router_topk": 1},
    "bias": {"moe_router_enable_expert_bias": True},
    "capacity": {"moe_expert_capacity_factor": 0.75},
    "bias and capacity": {"moe_router_enable_expert_bias": True, "moe_expert_capacity_factor": 0.75},
}
GROUPS = {"expert_groups": {"image": 1, "text": 1, "shared": 2}}
BY_MODALITY = {
    "by modality": GROUPS | {"balance_per_modality": True},
    "by modality, together": GROUPS,
    "by modality, no groups": {"balance_per_modality": True},
    "by modality, bias": GROUPS | {"balance_per_modality": True, "moe_router_enable_expert_bias": True},
}
ONE = {"one": (1, {})}
LAYOUTS = {
    "dp2": (2, {}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2-vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "dp4": (4, {}),
    "dp2-tp2": (4, {"tensor_model_parallel_size": 2}),
    "dp2-cp2": (4, {"context_parallel_size": 2}),
    "pp2-tp2": (4, {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2}),
    "pp2-cp2": (4, {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}),
}
PLACEMENTS = ("first_half", "second_half")  # the other stage of a pipeline has no router


def job(kind: str, gate: str, rows: str, size: int, layout: str, placement: str = "sparse") -> dict:
    world, parallel = (ONE | LAYOUTS)[layout]
    moe = (GATES | BY_MODALITY)[gate] | {"moe_router_load_balancing_type": kind, "placement": placement}
    name = f"balancing {kind} {gate} {rows}{size} {layout} {placement}"
    return {
        "id": name,
        "run": "run_balancing",
        "world": world,
        "parallel": parallel,
        "moe": moe,
        "rows": rows,
        "size": size,
        "component": "language",
    }


def vision_job(component: str, kind: str, layout: str, **moe) -> dict:
    """Rows of images in the place of tokens; half of the micro-batches of a data-parallel rank may have none."""
    world, parallel = (ONE | LAYOUTS)[layout]
    gate = " ".join(f"{name}={value}" for name, value in moe.items())
    return {
        "id": f"balancing {component} {kind} {layout} {gate}".strip(),
        "run": "run_balancing",
        "world": world,
        "parallel": parallel,
        "moe": moe | {"moe_router_load_balancing_type": kind},
        "rows": "padded",
        "size": 2,
        "component": component,
    }


def spread(kind: str) -> list[dict]:
    jobs = [job(kind, "softmax", "padded", 2, layout) for layout in LAYOUTS if "vpp" not in layout]
    jobs += [job(kind, "softmax", "packed", 2, layout) for layout in ("dp2", "tp2", "cp2", "pp2-vpp2", "dp2-cp2")]
    jobs += [job(kind, "bias", "padded", 2, layout) for layout in ("dp2", "tp2")]
    jobs += [job(kind, "capacity", "padded", 2, layout) for layout in ("dp2", "pp2")]
    return jobs + [
        job(kind, "softmax", "padded", 2, layout, placement)
        for layout in ("pp2", "pp2-tp2", "pp2-cp2")
        for placement in PLACEMENTS
    ]


JOBS = [
    *(job(kind, gate, "padded", size, "one") for kind in KINDS for gate in GATES for size in (1, 2, 8)),
    *(job(kind, gate, "packed", 2, "one") for kind in KINDS for gate in GATES),
    *(item for kind in KINDS for item in spread(kind)),
    *(job(kind, gate, "padded", 2, "one") for kind in KINDS[:3] for gate in BY_MODALITY),
    *(job(kind, "by modality", "padded", 1, "one") for kind in KINDS[:3]),
    *(job(kind, "by modality", "padded", 2, layout) for kind in KINDS[:3] for layout in ("dp2", "tp2")),
    *(job(kind, "by modality", "packed", 2, layout) for kind in KINDS[:3] for layout in ("cp2", "pp2-vpp2")),
    *(job(kind, "by modality, together", "padded", 2, "dp2") for kind in KINDS[:3]),
    *(
        vision_job(component, "aux_loss", layout)
        for component in ("tower", "projector")
        for layout in ("one", "dp2", "ep2", "tp2", "cp2", "pp2", "dp2-tp2", "dp2-cp2")
    ),
    *(vision_job(component, "none", "one") for component in ("tower", "projector")),
    vision_job("tower", "aux_loss", "dp2", moe_router_topk=1, normalize_top1=True),
]


@pytest.mark.parametrize("job", JOBS, ids=[item["id"] for item in JOBS])
def test_loss_is_what_its_definition_says(job, result):
    assert result["size"] > 1e-3, "there is a gradient to compare"
    assert result["gradient"] <= GRADIENT
    names = ["z_loss"] + (["load_balancing_loss"] if job["moe"]["moe_router_load_balancing_type"] != "none" else [])
    for name in names:
        assert result[name] <= VALUE, f"{name} by layer in the routing record"
        assert result[f"mean {name}"] <= VALUE, f"{name} in the log of every rank"
    assert "load_balancing_loss" not in result or "load_balancing_loss" in names
