"""LayerNorm and RMSNorm for the local layer spec.

Megatron-core's WrappedTorchNorm asserts that sequence parallelism is off, yet MoE layers under tensor parallelism demand
it. Under sequence parallelism every rank sees its own tokens, so the gradients of a norm must be summed over the
tensor-parallel group: the attribute `sequence_parallel` asks megatron-core for that.
"""

from typing import Any

import torch

from megatron.core.transformer.transformer_config import TransformerConfig

NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


class Norm:
    """A builder with megatron-core's interface; the module is torch's own."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_) -> Any:
        norm = NORMS[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
