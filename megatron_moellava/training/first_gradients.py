"""Whether what a run trains receives gradients at all, found out in its first step instead of at its end.

A gradient that is zero has been received (text rows give the projector one); none arrives where the graph is cut.
"""

from collections.abc import Iterable

import torch.distributed as dist

from megatron_moellava.config import ConfigError, MoELlavaError
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.model.roles import parameter_roles
from megatron_moellava.stages import ROLES


class NothingTrains(MoELlavaError):
    """The graph of a step does not reach the parameters that the run trains."""


def require_trained(trained: dict[str, int], roles: Iterable[str]) -> None:
    """`trained`: parameters of this rank by role. Collective; raises ConfigError when no rank has any of these roles."""
    everywhere: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, trained)
    if not any(everywhere):
        raise ConfigError(
            f"training.trains={', '.join(roles)}: this model has no such parameters, so nothing would train; "
            f"roles are {', '.join(ROLES)}"
        )


class FirstGradients:
    """Listens to the trained parameters of this rank until `check`."""

    def __init__(self, chunks: list[MoELlava]):
        self.trained = [(role, p) for chunk in chunks for role, _, p in parameter_roles(chunk) if p.requires_grad]
        self.received: set[str] = set()
        self.hooks = [p.register_post_accumulate_grad_hook(self._receive(role)) for role, p in self.trained]

    def _receive(self, role: str):
        return lambda parameter: self.received.add(role)

    def check(self) -> None:
        """After a backward pass. Collective; raises NothingTrains on every rank when a trained role received no gradient
        on any."""
        for hook in self.hooks:
            hook.remove()
        # A fused kernel adds to the buffer of gradients by itself, and says so.
        self.received |= {role for role, p in self.trained if getattr(p, "grad_added_to_main_grad", False)}
        found: list[tuple[set[str], set[str]]] = [(set(), set())] * dist.get_world_size()
        dist.all_gather_object(found, ({role for role, _ in self.trained}, self.received))
        roles, received = (set().union(*parts) for parts in zip(*found, strict=True))
        if silent := sorted(roles - received):
            raise NothingTrains(
                f"training.trains: {', '.join(silent)} received no gradient in the first step and would never change; "
                f"{'nothing else is trained' if not received else 'trained are ' + ', '.join(sorted(received))}. "
                "Please report this run's settings; training.recompute=none may help meanwhile"
            )
