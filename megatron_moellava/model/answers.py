"""What a model's logits say of a batch's labels, without generating.

Suffixes: B rows, S positions, L those of this context-parallel rank, V logits.
"""

import torch
import torch.nn.functional as F

from megatron_moellava.data.encode import IGNORE_INDEX
from megatron_moellava.model.context_parallel import share, whole_rows


def token_losses(
    labels_BS: torch.Tensor, logits_BLV: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, S] loss of each label in nats, fp32, 0 where there is none; [B, S] likeliest next token), of whole rows.

    `vocab_size`: the tokenizer's; the model may have rows that no token stands for. Collective under context parallelism.
    """
    labels_BL = share(labels_BS)
    is_answer_BL = labels_BL != IGNORE_INDEX  # few of the positions: their logits alone become fp32
    losses_BL = torch.zeros_like(labels_BL, dtype=torch.float32)
    losses_BL[is_answer_BL] = F.cross_entropy(
        logits_BLV[is_answer_BL].float(), labels_BL[is_answer_BL], reduction="none"
    )
    guesses_BL = logits_BLV[..., :vocab_size].argmax(dim=-1)
    return whole_rows(losses_BL), whole_rows(guesses_BL)
