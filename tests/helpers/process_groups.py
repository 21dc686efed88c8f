"""What a test that builds many trainers in one process must do between them."""

import gc

from megatron.core.distributed import DistributedDataParallel


def release_groups() -> None:
    """Free the groups of a finished job: each has threads that poll 100 times a second, and dozens add up to a standstill.

    A DistributedDataParallel keeps them alive: module -> dispatcher -> last activations -> graph -> gradient accumulator
    -> hook -> DistributedDataParallel, a cycle that the garbage collector cannot see through.
    """
    for item in gc.get_objects():
        # `isinstance` would ask what a weak proxy stands for; torch.compile leaves some that stand for nothing
        if issubclass(type(item), DistributedDataParallel):
            vars(item).clear()
    gc.collect()
