"""Functions that torch.compile may take compute the same compiled, and only where a run asks for it."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from megatron_moellava.compiled import compile_elementwise, compiles, fusible
from megatron_moellava.machine import COMPILER
from megatron_moellava.model import fused
from megatron_moellava.model.experts import WeightedActivation

from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"torch.compile needs a C++ compiler ({COMPILER})"
)


@pytest.fixture
def compiled():
    compile_elementwise(True)
    yield
    compile_elementwise(False)


def test_nothing_is_compiled_unasked(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    double = fusible(lambda x: 2 * x)
    assert not compiles() and double(3) == 6 and asked == []
    compile_elementwise(True)
    try:
        assert double(3) == 6 and double(4) == 8 and asked == [{"dynamic": True}]
    finally:
        compile_elementwise(False)


def drawn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).to(dtype)


ANGLES = drawn(6, 1, 1, 8).repeat(1, 1, 1, 2)[..., :8]
# name: (function, shapes of its inputs)
FUNCTIONS = {
    "norm": (lambda x, weight: fused.RootMeanSquare.apply(x, weight, 1e-5), [(6, 2, 16), (16,)]),
    "rotation": (lambda heads: fused.rotated(heads, ANGLES), [(6, 2, 3, 8)]),
    "SwiGLU of experts": (lambda x, weights: WeightedActivation.apply(x, weights, F.silu, True), [(300, 64), (300, 1)]),
    "SiLU of experts": (lambda x, weights: WeightedActivation.apply(x, weights, F.silu, False), [(300, 64), (300, 1)]),
    "another of experts": (
        lambda x, weights: WeightedActivation.apply(x, weights, F.gelu, True),
        [(300, 64), (300, 1)],
    ),
    "SwiGLU of an FFN": (lambda x: bias_swiglu_impl(x, None), [(6, 2, 64)]),
}


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_functions_compute_the_same(name, dtype):
    function, shapes = FUNCTIONS[name]
    found = []
    for on in (False, True):
        compile_elementwise(on)
        try:
            inputs = [drawn(*shape, dtype=dtype).requires_grad_() for shape in shapes]
            output = function(*inputs)
            found.append([output, *torch.autograd.grad(output, inputs, drawn(*output.shape, dtype=output.dtype))])
        finally:
            compile_elementwise(False)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other, **tolerance)
        assert ours.dtype == other.dtype
