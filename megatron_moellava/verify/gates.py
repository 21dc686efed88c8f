"""Gates alone: recorded logits and noise -> the two experts of each token, slots, weights, balance loss."""

import torch

from megatron_moellava.model.original_gate import Gate, expert_capacity, top1_gate, top2_gate
from megatron_moellava.verify.folder import Folder
from megatron_moellava.verify.session import Gating
from megatron_moellava.verify.table import Table

FILES = ("moe.pt", "moe_residual.pt")
ALONE = 1e-6  # the same logits; measured 0
# Inside a model the logits differ by 4e-6 already, and softmax and renormalisation keep that size; measured 1e-6.
IN_MODEL = 8e-6


def verify_gates(folder: Folder, table: Table) -> None:
    """Compare the gates of every recorded case, each on its recorded logits."""
    for file in FILES:
        if folder.has(file):
            for case, recorded in cases_of(folder.load(file), file).items():
                for name, expected in recorded.get("gates", {}).items():
                    compare_gate(table, f"gate {case} {short(name)}", compute(expected), expected, ALONE)


def cases_of(content: dict, file: str) -> dict[str, dict]:
    """Recorded cases by name; moe_residual.pt holds a single one."""
    return {"residual": content} if "logits" in content else content


def short(name: str) -> str:
    """model.layers.2.mlp.deepspeed_moe.gate -> layer 2."""
    return "layer " + next(part for part in name.split(".") if part.isdigit())


def noise_of(expected: dict) -> torch.Tensor:
    """The recorded noise [N, E]: of the choice (top-2) or of the order of tokens (top-1)."""
    return expected["noise"] if "noise" in expected else expected["rts_uniform"]


def compute(expected: dict) -> Gating:
    """Our gate on the recorded logits, with the recorded noise and settings."""
    logits_NE, topk = expected["logits"], expected["k"]
    slots = expert_capacity(
        len(logits_NE), logits_NE.shape[1], expected["capacity_factor"], topk, expected["min_capacity"]
    )
    gate = top1_gate if topk == 1 else top2_gate
    return Gating(logits_NE, gate(logits_NE, slots, noise_of(expected)))


def compare_gate(table: Table, case: str, ours: Gating, expected: dict, tolerance: float) -> None:
    """Every quantity that the recording defines."""
    gate: Gate = ours.gate
    table.equal(case, "first expert", gate.choices_NK[:, 0], expected["e1"])
    if "e2" in expected:
        table.equal(case, "second expert", gate.choices_NK[:, 1], expected["e2"])
    table.equal(case, "capacity", gate.capacity, expected["capacity"])
    table.equal(case, "slots", gate.slots_NE, expected["slot"])
    table.equal(case, "sent", gate.routing_map_NE, expected["slot"] >= 0)
    table.close(case, "weights", gate.probs_NE.detach(), expected["weights"], tolerance)
    table.close(case, "balance loss", gate.aux_loss.detach(), expected["l_aux"], tolerance)
