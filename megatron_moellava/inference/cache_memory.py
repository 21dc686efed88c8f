"""How much memory keys and values of running requests may take, and which requests fit into it."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_moellava import platform
from megatron_moellava.config import ConfigError, DataError
from megatron_moellava.model.kv_cache import GROWTH
from megatron_moellava.model.moe_llava import MoELlava

GIB = 2**30
# Of what is free beside the weights: the activations of a step take the rest, and a layer's cache is there twice while
# it grows.
SHARE = 0.7


@dataclass(frozen=True, slots=True)
class CacheMemory:
    """Every rank has the same numbers, because ranks that share requests must admit the same ones."""

    bytes_per_position: int  # of one row, in all layers of a rank
    limit: float  # bytes; infinite: none

    @classmethod
    def of(cls, model: MoELlava, gib: float | None) -> "CacheMemory":
        """`gib`: the limit; None: what the GPU with the least free memory has room for, or no limit on a CPU. Collective.

        Raises ConfigError for a limit that is not positive.
        """
        if gib is not None and gib <= 0:
            raise ConfigError(f"--memory-limit={gib:g} must be more than 0 GiB")
        config = model.config
        layers = math.ceil(config.num_layers / config.pipeline_model_parallel_size)
        each = layers * _channels(model) * config.params_dtype.itemsize
        return cls(each, math.inf if gib is None else gib * GIB) if not platform.HAS_CUDA or gib else cls(each, _free())

    def size(self, rows: int, positions: int) -> int:
        """Bytes of so many rows that hold up to so many positions."""
        return rows * -(-positions // GROWTH) * GROWTH * self.bytes_per_position

    def fits(self, rows: int, positions: int) -> bool:
        """Whether so many rows of so many positions stay within the limit."""
        return self.size(rows, positions) <= self.limit

    def check(self, rows: int, positions: int) -> None:
        """Raises DataError where a request could not even run alone."""
        if not self.fits(rows, positions):
            raise DataError(
                f"{rows} row(s) of {positions} tokens need {self.size(rows, positions) / GIB:.2f} GiB for keys and values, and "
                f"the limit is {self.limit / GIB:.2f} GiB; ask for fewer tokens or beams, or raise --memory-limit"
            )


def _channels(model: MoELlava) -> int:
    """Of one position's keys and values in a layer; every rank has the whole latent of multi-latent attention."""
    config, latent = model.config, model.backbone.multi_latent_attention
    if latent is not None:
        return latent.kv_lora_rank + latent.qk_pos_emb_head_dim
    return 2 * math.ceil(config.num_query_groups / config.tensor_model_parallel_size) * config.kv_channels


def _free() -> float:
    """Bytes, of the rank that has the least."""
    free = torch.tensor(platform.free_memory_bytes() * SHARE, dtype=torch.float64, device=platform.device())
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    return float(free)
