"""New weights, drawn while they are written: a projector for stage 1, routers and coefficients for upcycling.

All are torch's default for a Linear layer, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), weight and bias alike, as in the
original. Each tensor has its own random stream, from the seed and its name, so the numbers depend on nothing else.
"""

import math
import zlib
from functools import partial

from megatron_moellava.conversion.recipes import Edit, Tensors
from megatron_moellava.conversion.tensors import Tensor
from megatron_moellava.costs.shapes import LANGUAGE, PROJECTOR, Model, megatron_tensors
from megatron_moellava.mapping import Shape


def generator(seed: int, name: str):
    """A torch.Generator of its own for each name. Torch's CPU generator looks at 32 bits of a seed only."""
    import torch

    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def _uniform(name: str, shape: Shape, fan_in: int, dtype: str, seed: int, scale: float):
    import torch

    bound = scale / math.sqrt(fan_in)
    values = torch.empty(shape).uniform_(-bound, bound, generator=generator(seed, name))
    return values.to(getattr(torch, dtype))


def linear_default(name: str, shape: Shape, fan_in: int, dtype: str, seed: int, scale: float = 1.0) -> Tensor:
    """A tensor of torch's default Linear initialisation, times `scale`."""
    return Tensor(shape, dtype, make=partial(_uniform, name, shape, fan_in, dtype, seed, scale))


def new_projector(model: Model, tensors: Tensors, seed: int) -> dict[str, Tensor]:
    """The tensors of a fresh projector, in the language model's dtype. An end of line is drawn like a bias."""
    dtype = next(tensor.dtype for name, tensor in tensors.items() if name.endswith((".mlp.fc1.weight", "norm.weight")))
    shapes = {name: shape for name, shape in megatron_tensors(model).items() if name.startswith(PROJECTOR)}
    fans = {name: shapes[name.rsplit(".", 1)[0] + ".weight"][-1] for name in shapes}
    return {name: linear_default(name, shape, fans[name], dtype, seed) for name, shape in shapes.items()}


def zeros(shape: Shape, dtype: str) -> Tensor:
    """Zeros: biases that a layout demands and the model lacks."""
    return Tensor(shape, dtype, make=partial(_zeros, shape, dtype))


def _zeros(shape: Shape, dtype: str):
    import torch

    return torch.zeros(shape, dtype=getattr(torch, dtype))


def noise(name: str, std: float, seed: int) -> Edit:
    """Adds N(0, std * standard deviation of the block) to what passes; computed in fp32."""
    import torch

    state = generator(seed, name)

    def add(block):
        values = block.float()
        scale = std * values.std(correction=0)
        return (values + scale * torch.randn(values.shape, generator=state)).to(block.dtype)

    return add


def language_dtype(tensors: Tensors) -> str:
    """Of the embeddings of a Megatron checkpoint."""
    return tensors[f"{LANGUAGE}embedding.word_embeddings.weight"].dtype
