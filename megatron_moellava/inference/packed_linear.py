"""PackedLinear with weights laid out for few rows.

One token per request makes decoding a matter of reading weights. oneDNN's own blocked layout of a weight is read about
twice as fast as the row-major one (8 rows x [32000, 512]: fp32 12.8 against 5.0 ms, bf16 5.6 against 3.0 ms, one core),
and is nowhere slower, up to 512 rows. The price is a second copy of the decoder's weights, CPU memory only.

oneDNN compiles a kernel for every number of rows and shape of a weight that it meets, in a millisecond or two and for half a
megabyte, and a server meets all of them. It and torch's layer above it keep 1,024 each, which took hours to fill and looked
like a leak; here both keep fewer. 16 single tokens at a time through 5 shapes are 80 of them, so that 128 leave too few for
prompts: `benchmarks/compiled_kernels.py` compares bounds.
"""

import os
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from megatron_moellava import platform

# Read by oneDNN and by torch when the process computes its first product with them; what the user says there stays.
KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}


def keep_fewer_kernels() -> None:
    """Bound what compiled kernels take, in a process that has not computed with oneDNN yet."""
    for variable, count in KERNELS.items():
        os.environ.setdefault(variable, count)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch and this CPU pack weights of this type.

    The operations are torch's, but not of its public API, and only trying tells: another torch may lack them
    (AttributeError), a CPU the type (RuntimeError). Then decoding is slower and no answer changes; a test wants them to
    be there with the torch of setup.py.
    """
    if platform.HAS_CUDA or not torch.backends.mkldnn.is_available():
        return False
    keep_fewer_kernels()
    try:
        product = _pack(torch.ones(32, 32, dtype=dtype))(torch.ones(2, 32, dtype=dtype), None)
    except (AttributeError, RuntimeError):
        return False
    return bool((product == 32).all())


def _pack(weight_OI: torch.Tensor):
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().contiguous(), 8)
    linear = torch.ops.mkldnn._linear_pointwise.default
    return lambda x, bias: linear(x, packed, bias, "none", [], "")


@dataclass(slots=True)
class PackedLinear:
    """`F.linear` whose weights are packed at first use. They must not change any more."""

    packs: bool
    _packed: dict[int, tuple] = field(default_factory=dict)  # by identity; the tensor is kept, so that it stays unique

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not self.packs:
            return F.linear(x, weight, bias)
        if id(weight) not in self._packed:
            self._packed[id(weight)] = weight, _pack(weight)
        return self._packed[id(weight)][1](x, bias)
