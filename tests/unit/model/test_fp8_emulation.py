"""FP8 emulation: rounding against torch's casts and its scaled product, blocks by definition, gradients, padding."""

import pytest
import torch

from megatron_moellava.model.configuration import FP8_RECIPES
from megatron_moellava.model.fp8_emulation import (
    Emulation,
    Product,
    Scaling,
    block_shape,
    grouped_product,
    padded_offsets,
    scale_of,
    to_fp8,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
each_recipe = pytest.mark.parametrize("recipe", FP8_RECIPES.values(), ids=FP8_RECIPES.keys())


def draw(*shape: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    """Entries over several orders of magnitude, so that a wrong scale is seen."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(spread * torch.randn(shape, generator=generator))


@pytest.mark.parametrize(("dtype", "largest"), [(E4M3, 448.0), (E5M2, 57344.0)])
def test_largest_entry_meets_the_largest_number(dtype, largest):
    x = draw(64)
    amax = x.abs().max()
    assert to_fp8(x, scale_of(amax, dtype, False), dtype).float().abs().max() == largest
    assert scale_of(torch.tensor(0.0), dtype, False) == 1.0


@pytest.mark.parametrize(("amax", "scale"), [(3.5, 128.0), (3.0, 128.0), (3.51, 64.0), (448.0, 1.0), (449.0, 0.5)])
def test_powers_of_two_are_rounded_down(amax, scale):
    assert scale_of(torch.tensor(amax), E4M3, True) == scale
    e8m0 = torch.tensor(1 / scale).to(torch.float8_e8m0fnu)  # MXFP8 stores the inverse in eight bits of exponent
    assert e8m0.float() == 1 / scale


def test_tensor_scaled_product_is_that_of_scaled_mm():
    scaling, x, weight = Scaling(FP8_RECIPES["tensorwise"], 1), draw(32, 64), draw(16, 64, seed=1)
    scales = [scale_of(item.abs().max(), E4M3, False) for item in (x, weight)]
    codes = [to_fp8(item, scale, E4M3) for item, scale in zip((x, weight), scales, strict=True)]
    expected = torch._scaled_mm(codes[0], codes[1].t(), 1 / scales[0], 1 / scales[1], out_dtype=torch.float32)
    found = Product.apply(x, weight[None], (0, 32), scaling)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (found - x @ weight.t()).abs().max() > 1e-3 * expected.abs().max()  # FP8 does round


@pytest.mark.parametrize("name", ["blockwise", "mxfp8"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["input", "weight"])
def test_blocks_are_rounded_one_by_one(name, axis, kind):
    """Against a loop over blocks, with a ragged edge; a cast of torch is what rounds."""
    recipe, x = FP8_RECIPES[name], draw(150, 200, spread=3.0)
    found = Scaling(recipe, 1).round(x, kind, axis)
    rows, columns = block_shape(recipe, kind, axis)
    assert (rows, columns) == {
        "blockwise": (128, 128) if kind == "weight" else ((128, 1) if axis == 0 else (1, 128)),
        "mxfp8": (32, 1) if axis == 0 else (1, 32),
    }[name]
    expected = torch.empty_like(x)
    for top in range(0, 150, rows):
        for left in range(0, 200, columns):
            tile = x[top : top + rows, left : left + columns]
            inverse = 2.0 ** torch.ceil(torch.log2(tile.abs().max() / 448.0))
            expected[top : top + rows, left : left + columns] = (tile / inverse).to(E4M3).float() * inverse
    assert torch.equal(found, expected)


@each_recipe
def test_gradients_are_products_of_rounded_operands(recipe):
    x, weight, gradient = draw(32, 64).requires_grad_(), draw(3, 48, 64, seed=1).requires_grad_(), draw(32, 48, seed=2)
    scaling, offsets = Scaling(recipe, 3), (0, 16, 16, 32)
    Product.apply(x, weight, offsets, scaling).backward(gradient)
    again = Scaling(recipe, 3)
    for expert, (a, b) in enumerate([(0, 16), (16, 16), (16, 32)]):
        rows = again.round(gradient[a:b], "gradient", 1, expert)
        assert torch.equal(x.grad[a:b], rows @ again.round(weight[expert].detach(), "weight", 0, expert))
        columns = again.round(gradient[a:b], "gradient", 0, expert).t()
        assert torch.equal(weight.grad[expert], columns @ again.round(x[a:b].detach(), "input", 0, expert))
    assert not weight.grad[1].any()  # no token came to it


def test_hybrid_gradients_are_e5m2_and_others_e4m3():
    x = draw(8, 32)
    for name, dtype in (("tensorwise", E5M2), ("mxfp8", E4M3)):
        scaling = Scaling(FP8_RECIPES[name], 1)
        rounded = scaling.round(x, "gradient", 1)
        amax = x.abs().max() if name == "tensorwise" else x.abs().amax(1, keepdim=True)
        scale = scale_of(amax, dtype, name == "mxfp8")
        assert torch.equal(rounded, to_fp8(x, scale, dtype).float() / scale)


def test_delayed_scale_comes_from_the_history():
    scaling, x = Scaling(FP8_RECIPES["delayed"], 1), draw(8, 32)
    first = scaling.round(x, "input", 1)
    assert torch.equal(first, Scaling(FP8_RECIPES["tensorwise"], 1).round(x, "input", 1))  # no history yet
    scaling.advance(scaling.seen_KE)
    larger = scaling.round(100 * x, "input", 1)
    limit = x.abs().max()
    assert torch.isclose(larger.abs().max(), limit)  # saturates at what the history promised
    scaling.advance(scaling.seen_KE)
    assert torch.isclose(scaling.round(100 * x, "input", 1).abs().max(), 100 * limit)
    for _ in range(FP8_RECIPES["delayed"].history):
        scaling.advance(torch.full_like(scaling.seen_KE, 1.0))
    assert torch.isclose(
        scaling.round(100 * x, "input", 1).abs().max(), torch.tensor(1.0)
    )  # the old ones are forgotten


@each_recipe
def test_padding_of_expert_rows_changes_nothing(recipe):
    counts = [5, 0, 19]
    x, weight = draw(24, 64).requires_grad_(), draw(3, 48, 64, seed=1).requires_grad_()
    offsets = padded_offsets(counts, recipe.multiple)
    assert offsets[1] == recipe.multiple and offsets[3] % recipe.multiple == 0
    output = grouped_product(Scaling(recipe, 3), x, weight, torch.tensor(counts))
    gradient = draw(24, 48, seed=2)
    output.backward(gradient)
    padded = [x.grad.clone(), weight.grad.clone()]
    x.grad = weight.grad = None
    plain = Product.apply(x, weight, (0, 5, 5, 24), Scaling(recipe, 3))
    plain.backward(gradient)
    assert torch.allclose(output, plain, rtol=1e-5, atol=1e-6)
    assert torch.allclose(padded[0], x.grad, rtol=1e-5, atol=1e-5 * float(x.grad.abs().max()))
    assert torch.allclose(padded[1], weight.grad, rtol=1e-5, atol=1e-5 * float(weight.grad.abs().max()))


def test_a_number_that_is_none_is_not_hidden():
    """The step is skipped when a gradient is not finite: rounding must not make it finite."""
    x = torch.tensor([[1.0, float("nan")], [2.0, 3.0]])
    for recipe in FP8_RECIPES.values():
        assert not Scaling(recipe, 1).round(x, "gradient", 1).isfinite().all()
    x[0, 1] = float("inf")
    for recipe in FP8_RECIPES.values():
        assert not Scaling(recipe, 1).round(x, "gradient", 1).isfinite().all()


@each_recipe
def test_a_checkpoint_holds_the_histories_of_a_recipe_that_has_some(recipe):
    kept, fresh = (Emulation(recipe, [Scaling(recipe, 2), Scaling(recipe, 1)]) for _ in range(2))
    for scaling in kept.scalings:
        scaling.history_TKE = torch.rand_like(scaling.history_TKE)
    fresh.load_state(kept.state())
    assert len(kept.state()) == (2 if recipe.history else 0)
    assert all(torch.equal(*pair) for pair in zip(fresh.state(), kept.state(), strict=True))


@each_recipe
def test_histories_of_other_modules_say_nothing_here(recipe):
    emulation = Emulation(recipe, [Scaling(recipe, 2)])
    before = [history.clone() for history in emulation.state()]
    emulation.load_state([torch.rand(3, 3, 3)])
    assert all(torch.equal(*pair) for pair in zip(emulation.state(), before, strict=True))
