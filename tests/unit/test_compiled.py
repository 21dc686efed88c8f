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
def asked(monkeypatch) -> list[str]:
    """Names of the functions that torch.compile is given; none is compiled yet."""
    names, compile_it = [], torch.compile

    def noted(function, **options):
        assert options == {}
        names.append(function.__name__)
        return compile_it(function, **options)

    monkeypatch.setattr(torch, "compile", noted)
    monkeypatch.setattr("megatron_moellava.compiled._made", {})
    yield names
    compile_elementwise(False)


def test_nothing_is_compiled_unasked_and_nothing_twice(asked, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(function.__name__) or function)

    @fusible
    def double(x):
        return 2 * x

    assert not compiles() and double(3) == 6 and asked == []
    compile_elementwise(True)
    assert double(3) == 6 and double(4) == 8 and asked == ["double"]
    compile_elementwise(False)
    assert double(3) == 6 and asked == ["double"]


def drawn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).to(dtype)


ANGLES = drawn(6, 1, 1, 8).repeat(1, 1, 1, 2)[..., :8]
EXPERTS = [(300, 64), (300, 1)]
OF_EXPERTS = {"activated", "activated_gradients"}
# name: (function, shapes of its inputs, what is compiled for it)
FUNCTIONS = {
    "norm": (
        lambda x, weight: fused.RootMeanSquare.apply(x, weight, 1e-5),
        [(6, 2, 16), (16,)],
        {"scaled_to_one", "scaled_to_one_gradients"},
    ),
    "rotation": (lambda heads: fused.rotated(heads, ANGLES), [(6, 2, 3, 8)], {"turned"}),
    "SwiGLU of experts": (lambda x, weights: WeightedActivation.apply(x, weights, F.silu, True), EXPERTS, OF_EXPERTS),
    "SiLU of experts": (lambda x, weights: WeightedActivation.apply(x, weights, F.silu, False), EXPERTS, OF_EXPERTS),
    "another of experts": (lambda x, weights: WeightedActivation.apply(x, weights, F.gelu, True), EXPERTS, set()),
    "SwiGLU of an FFN": (lambda x: bias_swiglu_impl(x, None), [(6, 2, 64)], {"swiglu", "swiglu_back"}),
}


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_functions_compute_the_same(name, dtype, asked):
    function, shapes, compiled = FUNCTIONS[name]
    found = []
    for on in (False, True):
        compile_elementwise(on)
        inputs = [drawn(*shape, dtype=dtype).requires_grad_() for shape in shapes]
        output = function(*inputs)
        found.append([output, *torch.autograd.grad(output, inputs, drawn(*output.shape, dtype=output.dtype))])
        assert set(asked) == (compiled if on else set())
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other, **tolerance)
        assert ours.dtype == other.dtype


@needs_compiler
def test_one_kernel_serves_what_differs_in_no_number(asked):
    """torch.compile gives up after eight kernels of a function, and a run has frozen parts and rows of any length."""
    compile_elementwise(True)

    def norm(x, is_trained: bool):
        weight = drawn(16).requires_grad_(is_trained)
        output = fused.RootMeanSquare.apply(x.requires_grad_(), weight, 1e-5)
        return torch.autograd.grad(output, [x, weight] if is_trained else [x], torch.ones_like(output))

    norm(drawn(6, 2, 16), True)
    norm(drawn(6, 2, 16), False)  # without the weight's gradient: a kernel of its own
    with torch.compiler.set_stance("fail_on_recompile"):
        for is_trained in (True, False):
            norm(drawn(9, 1, 16), is_trained)
            norm(drawn(2, 6, 16).transpose(0, 1), is_trained)
        with torch.no_grad():
            fused.RootMeanSquare.apply(drawn(7, 1, 16), drawn(16), 1e-5)


@needs_compiler
def test_one_kernel_serves_one_number_of_channels(asked):
    """Its loops are over as many as it knows; of any number, the gradient of an activation took four times as long."""
    compile_elementwise(True)

    def experts(rows: int, channels: int):
        inner, weights = drawn(rows, channels).requires_grad_(), drawn(rows, 1).requires_grad_()
        output = WeightedActivation.apply(inner, weights, F.silu, True)
        torch.autograd.grad(output, [inner, weights], torch.ones_like(output))

    experts(300, 64)
    with torch.compiler.set_stance("fail_on_recompile"):
        experts(77, 64)
        with pytest.raises(RuntimeError, match="recompile"):
            experts(300, 32)
