"""Whose fault it is that a step has no finite gradient. After the reduction over ranks it is everybody's."""

import math

import torch
import torch.distributed as dist

from megatron.core.distributed import DistributedDataParallel


class NonFiniteReport:
    """What each rank finds in its own work, before anything is summed over ranks."""

    def __init__(self, gradients_stay: bool):
        """`gradients_stay`: they are complete before any is reduced, so that a rank can look at its own."""
        self.gradients_stay = gradients_stay
        self.gradient_sums: list[torch.Tensor] = []

    def before_reduction(self, wrapped: list[DistributedDataParallel]) -> None:
        """Note this rank's gradients: one number per buffer, and nothing waits for it."""
        buffers = [buffer for chunk in wrapped for buffer in chunk.buffers + chunk.expert_parallel_buffers]
        self.gradient_sums = [buffer.grad_data.sum() for buffer in buffers] if self.gradients_stay else []

    def name(self, loss_sum: float, sample_ids: list[str]) -> tuple[str, str]:
        """("the loss of rank 3", "its, sample, ids") of a step that was skipped; collective."""
        found: list[tuple[int, list[str], str]] = [(0, [], "")] * dist.get_world_size()
        dist.all_gather_object(found, (dist.get_rank(), sample_ids, self._own(loss_sum)))
        return name_ranks(found)

    def _own(self, loss_sum: float) -> str:
        if not math.isfinite(loss_sum):
            return "loss"
        return "" if all(math.isfinite(value) for value in self.gradient_sums) else "gradient"


def name_ranks(found: list[tuple[int, list[str], str]]) -> tuple[str, str]:
    """Of (rank, sample ids, what is not finite there): who began, and with which samples.

    A loss comes first: a gradient may pass through the experts of other ranks. Where nobody can say, all samples are named.
    """
    for kind in ("loss", "gradient"):
        guilty = [item for item in found if item[2] == kind]
        if guilty:
            ranks = ", ".join(str(rank) for rank, *_ in guilty)
            return f"the {kind} of rank {ranks}", _names(guilty)
    return "the gradient", _names(found)


def _names(found: list[tuple[int, list[str], str]]) -> str:
    """Each once: ranks that share a model read the same samples."""
    return ", ".join(dict.fromkeys(name for _, ids, _ in found for name in ids))
