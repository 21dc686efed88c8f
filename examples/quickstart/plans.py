"""What the quickstart trains, preset by preset: the runs, what each starts from, and what it learns from.

Perception is easy-VQA, which the dense model solves, so that experts have nothing to add. Knowledge (preset `names`, the
default) is what a thing is called in eight languages: facts, of which there are more than the smaller model that learns them
can hold. There the dense model is continued and, upcycled, an MoE: eight whole experts in every layer, one for each token, so
that a token passes through as many FLOPs as in the dense model (but for the router's).
"""

from megatron_moellava.stages import STAGES

THINGS = 500  # emoji, of about 1,900
VIEWS = 4  # training pictures of each
CAPTIONS, EASY, NAMES = "captions.json", "conversations.json", "names.json"
SMALL = "llama-nano"  # the backbone that learns names
EXPERTS = {"num_moe_experts": 8, "moe_router_topk": 1, "placement": "dense", "normalize_top1": True}
# Of a run: optimizer steps and peak learning rate, what it starts from, and what it learns from: file -> how often an epoch
# sees each row. "backbone": another than --backbone; "moe": of its experts, the defaults where nothing is said.
PERCEPTION = {
    "stage1": {"stage": 1, "from": "start", "steps": 25, "lr": 3e-3, "data": {CAPTIONS: 1.0}, "questions": 1000},
    "stage2": {"stage": 2, "from": "stage1", "steps": 700, "lr": 2e-3, "data": {EASY: 1.0}},
    "stage3": {"stage": 3, "from": "upcycled", "steps": 90, "lr": 1e-3, "data": {EASY: 1.0}},
    "dense": {"stage": 2, "from": "stage2", "steps": 90, "lr": 1e-3, "data": {EASY: 1.0}},
}
# Short rows, since facts want many steps. There is no stage 1: the projector is trained with the language model.
_NAMES = {"lr": 3e-3, "data": {NAMES: 1.0}, "backbone": SMALL, "seq_length": 1024}
KNOWLEDGE = {
    "names": {"stage": 2, "from": "names_start", "steps": 900} | _NAMES,
    # Trains what the dense model's stage does, so that experts are all that the two differ in; the recipe's stage 3 keeps
    # attention, embeddings and norms as they are, with which facts are learned slower (docs/measurements/where_experts_pay.md).
    "names_moe": {"stage": 3, "from": "names_upcycled", "steps": 300, "moe": EXPERTS, "trains": list(STAGES[2])}
    | _NAMES,
    "names_dense": {"stage": 2, "from": "names", "steps": 300} | _NAMES,
}
PLANS = {"fast": PERCEPTION, "names": PERCEPTION | KNOWLEDGE, "full": PERCEPTION}
STARTS = {"start": "language_model", "names_start": "names_language_model"}  # checkpoint -> its random language model
UPCYCLED = {"upcycled": "stage2", "names_upcycled": "names"}  # checkpoint -> the run whose FFNs are copied
TITLES = {
    "stage1": "stage 1: projector",
    "stage2": "stage 2: projector + language model",
    "stage3": "stage 3: MoE",
    "dense": "stage 2 continued for as long (dense)",
    "names": "names, stage 2",
    "names_dense": "names, continued for as long (dense)",
    "names_moe": "names, stage 3: MoE, 8 experts, top-1",
}
