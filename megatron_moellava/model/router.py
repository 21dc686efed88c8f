"""Where a token chooses its experts: Megatron-Core's router, and the original's gate behind the same interface.

Shapes: S sequence (of this rank), B batch, H hidden, E experts, N = S * B tokens. Megatron-Core flattens [S, B] sequence
first; the original counts places batch first, over the whole sequence, so `OriginalRouter` gathers and transposes.
"""

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from megatron_moellava import parallel
from megatron_moellava.config import MoEConfig
from megatron_moellava.model.original_gate import Draw, OriginalGate, no_noise

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, z_loss_func
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

    def probabilities(self, logits_NE: torch.Tensor) -> torch.Tensor:
        """[N, E] over all experts (fp32), before any choice."""
        logits_NE = logits_NE.float()
        if self.score_function == "softmax":
            return logits_NE.softmax(dim=-1)
        scores_NE = logits_NE.sigmoid()
        return scores_NE / scores_NE.sum(dim=-1, keepdim=True)

    def choices(self, logits_NE: torch.Tensor) -> torch.Tensor:
        """[N, K], the experts that each token asks for, before any capacity is looked at."""
        scores_NE = logits_NE
        if self.expert_bias is not None:
            scores_NE = logits_NE.float().sigmoid() + self.expert_bias
        return scores_NE.topk(self.topk, dim=-1).indices

    def _apply_expert_bias(self, routing_map_NE: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Megatron-Core 0.19.2 masks the [N, E] map by a mask [N], which does not broadcast."""
        super()._apply_expert_bias(routing_map_NE, None if padding_mask is None else padding_mask.unsqueeze(-1))

    def apply_z_loss(self, logits_NE: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The mean over the real tokens of the micro-batch. Megatron-Core averages the means of the tensor-parallel ranks,
        though one may hold more padding than another: the result would depend on the layout."""
        ranks, coefficient = self.tp_cp_group.size(), self.config.moe_z_loss_coeff
        if padding_mask is None or ranks == 1 or not coefficient:
            return super().apply_z_loss(logits_NE, padding_mask)
        if not (self.training and torch.is_grad_enabled()):
            return logits_NE
        here = (~padding_mask).sum()
        everywhere = here.clone()
        torch.distributed.all_reduce(everywhere, group=self.tp_cp_group)
        z_loss = z_loss_func(logits_NE, 1.0, padding_mask) * (here / everywhere.clamp(min=1))
        get_moe_metrics_tracker().record(
            "z_loss", z_loss.detach() * ranks, self.layer_number, self.config.num_layers, avg_group=self.tp_dp_cp_group
        )
        return MoEAuxLossAutoScaler.apply(logits_NE, z_loss * coefficient)


class OriginalRouter(MegatronRouter):
    """The gate of DeepSpeed 0.9.5 (`original_gate.py`), the same under any tensor, sequence, expert, pipeline layout."""

    def __init__(self, *arguments, moe: MoEConfig, **options):
        super().__init__(*arguments, **options)
        self.moe, self.gate = moe, OriginalGate(moe, no_noise)

    def set_layer_number(self, layer_number: int) -> None:
        super().set_layer_number(layer_number)
        self.gate.noise = LayerNoise(layer_number)

    def routing(self, logits_SBE: torch.Tensor, padding_mask: torch.Tensor | None = None):
        """Returns weights [N, E] (fp32) and map [N, E] (bool) in Megatron-Core's order. Padding takes part.

        `padding_mask` [S, B], with sequence parallelism only: True in the columns beyond the longest row. They are
        there to make the length divisible, the original's batch does not have them, and they get no expert.
        """
        if self.sequence_split > 1:
            logits_SBE = gather_from_sequence_parallel_region(logits_SBE, group=self.tp_group)
        length, batch, experts = logits_SBE.shape
        width = length - self._added_columns(padding_mask)
        gate = self.gate(logits_SBE[:width].transpose(0, 1).reshape(-1, experts))
        probs_NE = self._attach(self.of_this_rank(gate.probs_NE, length, batch), gate.aux_loss)
        return probs_NE, self.of_this_rank(gate.routing_map_NE, length, batch)

    @property
    def sequence_split(self) -> int:
        """Ranks that share a sequence."""
        return self.tp_group.size() if self.config.sequence_parallel else 1

    def of_this_rank(self, item_NE: torch.Tensor, length: int, batch: int) -> torch.Tensor:
        """What the gate said of the whole sequence, batch-major, for this rank's tokens in Megatron-Core's order.

        `length`: of the sequence with the columns that the gate was not shown; they get zeros.
        """
        item_SBE = item_NE.view(batch, -1, item_NE.shape[-1]).transpose(0, 1)
        item_SBE = F.pad(item_SBE, (0, 0, 0, 0, 0, length - len(item_SBE)))
        rank = self.tp_group.rank() if self.sequence_split > 1 else 0
        return item_SBE.chunk(self.sequence_split)[rank].reshape(-1, item_NE.shape[-1])

    def _added_columns(self, padding_mask: torch.Tensor | None) -> int:
        if padding_mask is None:
            return 0
        count = padding_mask[:, 0].sum()
        torch.distributed.all_reduce(count, group=self.tp_group)
        return int(count)

    def _attach(self, probs_NE: torch.Tensor, aux_loss: torch.Tensor) -> torch.Tensor:
        """Add coefficient * aux loss to the loss, once per layer and micro-batch, and record it for the log."""
        if not (self.training and torch.is_grad_enabled()):
            return probs_NE
        get_moe_metrics_tracker().record(
            "load_balancing_loss", aux_loss.detach(), self.layer_number, self.config.num_layers
        )
        if not self.moe.aux_loss_gradient or self.moe.moe_aux_loss_coeff == 0:
            return probs_NE
        # Every tensor-parallel rank attaches it to its own copy, and the gather's backward sums the copies.
        return MoEAuxLossAutoScaler.apply(probs_NE, aux_loss * (self.moe.moe_aux_loss_coeff / self.sequence_split))


class LayerNoise:
    """Fresh noise from a layer's own stream, so that it depends neither on the layout nor on recomputation."""

    def __init__(self, layer_number: int):
        """Starts the stream here, before any state of the generators is taken for a recomputation."""
        self.stream, tracker = f"router-{layer_number}", get_cuda_rng_tracker()
        if self.stream not in tracker.get_states():
            seed = torch.initial_seed() % 2**31 + 100_003 * layer_number + parallel.data_parallel_rank()
            tracker.add(self.stream, seed)

    def __call__(self, logits_NE: torch.Tensor, draw: Draw) -> torch.Tensor:
        """[N, E] on the device of the logits."""
        with get_cuda_rng_tracker().fork(self.stream):
            return draw(tuple(logits_NE.shape), device=logits_NE.device)


def uniform_router_init(weight_EH: torch.Tensor) -> torch.Tensor:
    """torch.nn.Linear's default for a [E, H] weight: U(-1/sqrt(H), 1/sqrt(H)), as the original's gate starts."""
    bound = 1.0 / math.sqrt(weight_EH.shape[1])
    return torch.nn.init.uniform_(weight_EH, -bound, bound)


MODULES = {"megatron": MegatronRouter, "original": OriginalRouter}  # by the kinds of `routers.py`


def router_builder(moe: MoEConfig) -> Callable[..., MegatronRouter]:
    """What makes the routers of a run."""
    module = MODULES[moe.router]
    return partial(module, moe=moe) if issubclass(module, OriginalRouter) else module
