"""The three stages of MoE-tuning as data: which roles of parameters each one trains (`model/roles.py` finds them)."""

ROLES = (
    "tower",
    "projector",
    "language.embedding",  # word embeddings and output layer
    "language.attention",
    "language.norm",
    "language.ffn",  # FFN of the dense layers, and the dense FFN beside the experts of a residual MoE
    "experts",
    "router",  # and the mixing coefficient of a residual MoE
)
LANGUAGE = tuple(role for role in ROLES if role not in ("tower", "projector"))
STAGES = {
    1: ("projector",),
    2: ("projector", *LANGUAGE),
    3: ("projector", "language.ffn", "experts", "router"),
}
