"""Where a token chooses its experts: Megatron-Core's router, and the original's gate behind the same interface.

Shapes: S sequence (of this rank), B batch, H hidden, E experts, N = S * B tokens. Megatron-Core flattens [S, B] sequence
first; the original counts places batch first, over the whole sequence, so `OriginalRouter` gathers and transposes.
"""

import copy
import math

import torch

from megatron_moellava import parallel
from megatron_moellava.config import MoEConfig
from megatron_moellava.model.original_gate import expert_capacity, gumbel, top1_gate, top2_gate

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig


class MegatronRouter(TopKRouter):
    """Megatron-Core's top-k router without a bias, with fp32 weights that start as torch's Linear does.

    Megatron-Core adds a bias to the router of every model whose MLPs have one (Phi-2); the original has none.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ):
        unbiased = copy.copy(config)
        unbiased.add_bias_linear = False
        unbiased.params_dtype = torch.float32
        unbiased.init_method = uniform_router_init
        super().__init__(config=unbiased, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)


class OriginalRouter(MegatronRouter):
    """The gate of DeepSpeed 0.9.5 (`original_gate.py`), the same under any tensor, sequence, expert, pipeline layout."""

    moe: MoEConfig  # a subclass made by `router_class` carries it
    injected_noise_NE: torch.Tensor | None = None  # for tests: used instead of fresh noise, batch-major

    def routing(self, logits_SBE: torch.Tensor, padding_mask: torch.Tensor | None = None):
        """Returns weights [N, E] (fp32) and map [N, E] (bool) in Megatron-Core's order. Padding takes part."""
        split = self.tp_group.size() if self.config.sequence_parallel else 1
        if split > 1:
            logits_SBE = gather_from_sequence_parallel_region(logits_SBE, group=self.tp_group)
        length, batch, experts = logits_SBE.shape
        logits_NE = logits_SBE.transpose(0, 1).reshape(-1, experts)
        gate = self._gate(logits_NE)

        probs_NE, map_NE = (
            item.view(batch, length, experts).transpose(0, 1).chunk(split)[self.tp_group.rank() if split > 1 else 0]
            for item in (gate.probs_NE, gate.routing_map_NE)
        )
        probs_NE = self._attach(probs_NE.reshape(-1, experts), gate.aux_loss, split)
        return probs_NE, map_NE.reshape(-1, experts)

    def _gate(self, logits_NE: torch.Tensor):
        moe = self.moe
        factor = moe.capacity_factor if self.training else moe.eval_capacity_factor
        slots = expert_capacity(*logits_NE.shape, factor, moe.moe_router_topk, moe.min_capacity)
        if moe.moe_router_topk == 1:
            return top1_gate(logits_NE, slots, self._noise(logits_NE, torch.rand))
        if moe.second_choice == "deterministic":
            return top2_gate(logits_NE, slots, torch.zeros_like(logits_NE))
        return top2_gate(logits_NE, slots, self._noise(logits_NE, gumbel))

    def _noise(self, logits_NE: torch.Tensor, draw) -> torch.Tensor:
        """Fresh noise from this layer's own stream, so that it depends neither on the layout nor on recomputation."""
        if self.injected_noise_NE is not None:
            return self.injected_noise_NE.to(logits_NE)
        name, tracker = f"router-{self.layer_number}", get_cuda_rng_tracker()
        if name not in tracker.get_states():
            tracker.add(
                name, torch.initial_seed() % 2**31 + 100_003 * self.layer_number + parallel.data_parallel_rank()
            )
        with tracker.fork(name):
            return draw(tuple(logits_NE.shape), device=logits_NE.device)

    def _attach(self, probs_NE: torch.Tensor, aux_loss: torch.Tensor, split: int) -> torch.Tensor:
        """Add coefficient * aux loss to the loss, once per layer and micro-batch, and record it for the log."""
        if not (self.training and torch.is_grad_enabled()):
            return probs_NE
        get_moe_metrics_tracker().record(
            "load_balancing_loss", aux_loss.detach(), self.layer_number, self.config.num_layers
        )
        if not self.moe.aux_loss_gradient or self.moe.moe_aux_loss_coeff == 0:
            return probs_NE
        # Every tensor-parallel rank attaches it to its own copy, and the gather's backward sums the copies.
        return MoEAuxLossAutoScaler.apply(probs_NE, aux_loss * (self.moe.moe_aux_loss_coeff / split))


def uniform_router_init(weight_EH: torch.Tensor) -> torch.Tensor:
    """torch.nn.Linear's default for a [E, H] weight: U(-1/sqrt(H), 1/sqrt(H)), as the original's gate starts."""
    bound = 1.0 / math.sqrt(weight_EH.shape[1])
    return torch.nn.init.uniform_(weight_EH, -bound, bound)


def router_class(moe: MoEConfig) -> type[MegatronRouter]:
    """The router that a run asks for."""
    if moe.router == "megatron":
        return MegatronRouter
    return type("OriginalRouter", (OriginalRouter,), {"moe": moe})
