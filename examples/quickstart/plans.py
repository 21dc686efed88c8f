"""What the quickstart trains, preset by preset: the runs, what each starts from, and what it learns from.

With names (the default) every stage has both: easy-VQA, a task of perception that the dense model solves, and names, more
facts than it learns. From stage 2 the dense model is continued and, upcycled, an MoE: eight whole experts in every layer, one
for each token, so that a token passes through as many FLOPs as in the dense model (but for the router's).
"""

from megatron_moellava.stages import STAGES

THINGS = 500  # emoji, of about 1,900
VIEWS = 4  # training pictures of each
CAPTIONS, EASY, NAMES = "captions.json", "conversations.json", "names.json"
# File -> how often an epoch sees each of its rows. Stage 2 learns perception; after it, enough is left not to forget it.
BOTH = {NAMES: 3.0, EASY: 1.0}
FACTS = {NAMES: 1.0, EASY: 0.1}
# Optimizer steps (of two rows), peak learning rate, and what a run starts from.
WITH_NAMES = {
    "stage1": {"stage": 1, "from": "start", "steps": 50, "lr": 3e-3, "data": {CAPTIONS: 1.0}, "questions": 500},
    "stage2": {"stage": 2, "from": "stage1", "steps": 1200, "lr": 2e-3, "data": BOTH},
    # Trains what the dense model's stage does, so that experts are all that the two differ in; the recipe's stage 3 keeps
    # attention, embeddings and norms as they are, with which facts are learned slower (docs/measurements/where_experts_pay.md).
    "stage3": {"stage": 3, "from": "upcycled", "steps": 300, "lr": 2e-3, "data": FACTS, "trains": list(STAGES[2])},
    "dense": {"stage": 2, "from": "stage2", "steps": 300, "lr": 2e-3, "data": FACTS},
}
PERCEPTION = {
    "stage1": {"stage": 1, "from": "start", "steps": 25, "lr": 3e-3, "data": {CAPTIONS: 1.0}, "questions": 1000},
    "stage2": {"stage": 2, "from": "stage1", "steps": 600, "lr": 2e-3, "data": {EASY: 1.0}},
    "stage3": {"stage": 3, "from": "upcycled", "steps": 90, "lr": 1e-3, "data": {EASY: 1.0}},
    "dense": {"stage": 2, "from": "stage2", "steps": 90, "lr": 1e-3, "data": {EASY: 1.0}},
}
PLANS = {"names": WITH_NAMES, "fast": PERCEPTION, "full": PERCEPTION}
SEQ_LENGTH = {"names": 1024, "fast": 2048, "full": 2048}  # tokens of a row: facts want many steps
EXPERTS = {
    "names": {"num_moe_experts": 8, "moe_router_topk": 1, "placement": "dense", "normalize_top1": True},
    "fast": {},
    "full": {},
}
TITLES = {
    "stage1": "stage 1: projector",
    "stage2": "stage 2: projector + language model",
    "stage3": "stage 3: MoE",
    "dense": "stage 2 continued for as long (dense)",
}
