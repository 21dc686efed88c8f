"""What the preset `names` trains after easy-VQA's stage 2: the same stages on facts, with experts at equal computation.

Stage 2 goes on with names. From there the dense model is continued and, upcycled, an MoE: eight whole experts in every
layer, one for each token, so that a token passes through as many FLOPs as in the dense model (but for the router's).
"""

from megatron_moellava.stages import STAGES

# File -> how often an epoch sees each of its rows: names, and enough of easy-VQA that it is not forgotten.
MIXTURE = {"names.json": 1.0, "conversations.json": 0.1}
THINGS = 500  # emoji, of about 1,900
VIEWS = 4  # training pictures of each
EXPERTS = {"num_moe_experts": 8, "moe_router_topk": 1, "placement": "dense", "normalize_top1": True}
RUNS = {
    "names": {"stage": 2, "from": "stage2", "steps": 400, "lr": 2e-3, "data": MIXTURE},
    # Trains what the dense model's stage does, so that experts are all that the two differ in; the recipe's stage 3 keeps
    # attention, embeddings and norms as they are, with which facts are learned slower (docs/measurements/where_experts_pay.md).
    "stage3": {"stage": 3, "from": "upcycled", "steps": 200, "lr": 2e-3, "data": MIXTURE, "trains": list(STAGES[2])},
    "dense": {"stage": 2, "from": "names", "steps": 200, "lr": 2e-3, "data": MIXTURE},
}
TITLES = {
    "stage2": "stage 2: easy-VQA alone",
    "names": "stage 2: names and easy-VQA",
    "dense": "the same continued for as long (dense)",
    "stage3": "stage 3: MoE, 8 experts, top-1",
}


def with_names(plan: dict[str, dict]) -> dict[str, dict]:
    """The plan of the preset: stages 1 and 2 as without names, then RUNS."""
    return {name: plan[name] for name in ("stage1", "stage2")} | RUNS
