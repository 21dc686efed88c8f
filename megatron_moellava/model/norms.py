"""LayerNorm and RMSNorm for the local layer spec.

Megatron-core's WrappedTorchNorm asserts that sequence parallelism is off, yet MoE layers under tensor parallelism demand
it. Under sequence parallelism every rank sees its own tokens, so the gradients of a norm must be summed over the
tensor-parallel group: the attribute `sequence_parallel` asks megatron-core for that.
"""

from typing import Any

import torch

from megatron_moellava.model.fused import RMSNorm

from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": RMSNorm}


class Norm:
    """A builder with megatron-core's interface; the modules are torch's, and `RMSNorm`."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_) -> Any:
        norm = NORMS[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class HeadsNorm(torch.nn.Module):
    """RMSNorm over all heads of q, or of k, together (OLMoE), in the place of Megatron-Core's norm of each head.

    Shapes: H heads of this tensor-parallel rank, A all heads, D channels of a head. Every rank has the weights of all heads
    and uses its own, so their gradients are zero elsewhere; Megatron-Core sums those of q and k norms over the ranks.
    """

    def __init__(self, heads: int, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        """`heads`: of all ranks; `hidden_size`: channels of one head, as Megatron-Core says it."""
        super().__init__()
        self.heads, self.eps = heads, eps
        self.weight = torch.nn.Parameter(torch.ones(heads * hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_HD: torch.Tensor) -> torch.Tensor:
        """[..., H, D] -> [..., H, D], in fp32 inside."""
        mine = slice(None)
        x = x_HD.float()
        squares = x.square().sum(dim=(-2, -1), keepdim=True)
        if x.shape[-2] < self.heads:
            # Each rank's part of the output depends on the sum over all heads, so the backward pass sums as well.
            squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
            first = parallel_state.get_tensor_model_parallel_rank() * x.shape[-2]
            mine = slice(first, first + x.shape[-2])
        scale = torch.rsqrt(squares / (self.heads * x.shape[-1]) + self.eps)
        return (x * scale).to(x_HD.dtype) * self.weight.view(self.heads, -1)[mine]
