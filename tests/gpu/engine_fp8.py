"""FP8 of `transformer_engine_torch` on a CPU, for Hopper's recipes: one scale for a tensor (of its own values, or of those
before it), or one for each block of 128. Values are rounded to FP8 for real; products are of what the bytes stand for.

As on Hopper a product reads its operands row by row only, so that each direction needs bytes of its own.
"""

import torch

from tests.gpu.engine_extension import exported, rows

BLOCK = 128


def kind(number: int) -> torch.dtype:
    from transformer_engine.pytorch.constants import DType

    return {DType.kFloat8E4M3: torch.float8_e4m3fn, DType.kFloat8E5M2: torch.float8_e5m2}[DType.cast(number)]


def is_blockwise(item) -> bool:
    return hasattr(item, "block_scaling_dim") or hasattr(item, "_rowwise_scale_inv")


@exported
def create_empty_quantized_tensor(quantizer, shape, dtype, device, pin_memory):
    from transformer_engine.pytorch.dynamo import TensorSpec
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer, Float8Tensor, Float8TensorStorage

    if not isinstance(quantizer, Float8Quantizer):
        return TensorSpec(tuple(shape), dtype, quantizer, device=device).create_tensor()
    uint8 = {"dtype": torch.uint8, "device": device}
    fields = {
        "data": torch.empty(shape, **uint8) if quantizer.rowwise_usage else None,
        "data_transpose": torch.empty(shape[-1], *shape[:-1], **uint8) if quantizer.columnwise_usage else None,
        "fp8_scale_inv": torch.empty(1, dtype=torch.float32, device=device),
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=dtype, **fields)
    return Float8Tensor(shape=tuple(shape), dtype=dtype, device=device, **fields)


@exported
def quantize(tensor, quantizer, output=None, noop=None):
    assert noop is None
    if output is None:
        output = create_empty_quantized_tensor(quantizer, list(tensor.shape), tensor.dtype, tensor.device, False)
    values = rows(tensor.detach()).float()
    if is_blockwise(quantizer):
        fill_blocks(values, quantizer, output)
    else:
        fill_whole(values, quantizer, output)
    return output


def scaled(amax: torch.Tensor, quantizer) -> torch.Tensor:
    """What brings a largest value to the top of FP8's range."""
    amax = amax.clamp(min=getattr(quantizer, "amax_epsilon", 0.0))
    scale = torch.where(amax > 0, torch.finfo(kind(quantizer.dtype)).max / amax, torch.ones_like(amax))
    return 2 ** scale.log2().floor() if getattr(quantizer, "force_pow_2_scales", False) else scale


def rounded(values: torch.Tensor, quantizer) -> torch.Tensor:
    """Bytes of values that have been scaled."""
    top = torch.finfo(kind(quantizer.dtype)).max
    return values.clamp(-top, top).to(kind(quantizer.dtype)).view(torch.uint8)


def fill_whole(values_MK: torch.Tensor, quantizer, output) -> None:
    amax = values_MK.abs().amax().reshape(1) if values_MK.numel() else values_MK.new_zeros(1)
    if hasattr(quantizer, "scale"):  # delayed: the scale is of the steps before, this one's largest value is noted
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
        scale = quantizer.scale
    else:
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        scale = scaled(amax, quantizer)
    output._scale_inv.copy_(1 / scale)
    data_MK = rounded(values_MK * scale, quantizer)
    if output._data is not None:
        output._data.copy_(data_MK.reshape(output._data.shape))
    if output._transpose is not None:
        output._transpose.copy_(data_MK.t().reshape(output._transpose.shape))
        output._transpose_invalid = False


def blocks(values_MK: torch.Tensor, height: int) -> torch.Tensor:
    """[M / height, K / 128] largest values of blocks."""
    m, k = values_MK.shape
    padded = torch.nn.functional.pad(values_MK.abs(), (0, -k % BLOCK, 0, -m % height))
    return padded.reshape(-(-m // height), height, -(-k // BLOCK), BLOCK).amax(dim=(1, 3))


def spread(blocks_RC: torch.Tensor, height: int, shape) -> torch.Tensor:
    return blocks_RC.repeat_interleave(height, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]


def fill_blocks(values_MK: torch.Tensor, quantizer, output) -> None:
    """Rows in blocks of 1 x 128 (or 128 x 128) along their own direction, so that columns are rows of the transpose."""
    height = BLOCK if quantizer.block_scaling_dim == 2 else 1
    sides = (("_rowwise", values_MK), ("_columnwise", values_MK.t()))
    for side, values in sides:
        data, target = getattr(output, f"{side}_data"), getattr(output, f"{side}_scale_inv")
        if data is None or not values.numel():
            continue
        scale = scaled(blocks(values, height), quantizer)
        data.copy_(rounded(values * spread(scale, height, values.shape), quantizer).reshape(data.shape))
        kept = 1 / scale if height == BLOCK else (1 / scale).t()
        target.zero_()
        target[: kept.shape[0], : kept.shape[1]] = kept


def side_of(item, is_transposed: bool) -> torch.Tensor:
    """What the bytes of one direction stand for, in fp32 as [M, K], or as [K, M] read the other way."""
    if is_blockwise(item):
        side = "_columnwise" if is_transposed else "_rowwise"
        data, scales = getattr(item, f"{side}_data"), getattr(item, f"{side}_scale_inv")
        assert data is not None, f"the product needs {side} data"
        values = (data.reshape(data.shape[0], -1) if is_transposed else rows(data)).view(kind(item._fp8_dtype)).float()
        height = BLOCK if item._is_2D_scaled else 1
        count = (-(-values.shape[0] // height), -(-values.shape[1] // BLOCK))
        kept = scales[: count[0], : count[1]] if item._is_2D_scaled else scales[: count[1], : count[0]].t()
        return values * spread(kept, height, values.shape)
    data = item._transpose if is_transposed else item._data
    assert data is not None and not (is_transposed and item._transpose_invalid), "the product needs the transpose"
    values = data.reshape(data.shape[0], -1) if is_transposed else rows(data)
    return values.view(kind(item._fp8_dtype)).float() * item._scale_inv


def is_quantized(item) -> bool:
    return hasattr(item, "_fp8_dtype")


@exported
def dequantize(tensor, dtype):
    from tests.gpu.engine_extension import TORCH

    has_rows = (tensor._rowwise_data if is_blockwise(tensor) else tensor._data) is not None
    values = side_of(tensor, False) if has_rows else side_of(tensor, True).t()
    return values.reshape(tuple(tensor.size())).to(TORCH[dtype])


@exported
def bgrad_quantize(grad, quantizer):
    return rows(grad).float().sum(0).to(grad.dtype), quantize(grad, quantizer)


@exported
def split_quantize(tensor, splits, quantizers, disable_bulk_allocation=False):
    return [quantize(part, one) for part, one in zip(tensor.split(list(splits)), quantizers, strict=True)]


@exported
def fp8_transpose(data, dtype, out=None):
    turned = rows(data).t().contiguous().reshape(data.shape[-1], *data.shape[:-1])
    return turned if out is None else out.copy_(turned)


@exported
def fused_amax_and_scale_update_after_reduction(amaxes, histories, scales, algorithm, dtype, margin) -> None:
    """Delayed scaling: the history moves on by one, and scales follow its largest values."""
    assert algorithm == "max" and margin == 0
    parts = amaxes.split([scale.numel() for scale in scales])
    for amax, history, scale in zip(parts, histories, scales, strict=True):
        history[0] = amax
        top = history.amax(0)
        scale.copy_(torch.where(top > 0, torch.finfo(kind(dtype)).max / top, scale))
        if len(history) > 1:
            history.copy_(history.roll(-1, 0))
        history[0] = 0


@exported
def fused_multi_row_padding(tensor, out, splits, padded) -> None:
    out.zero_()
    for source, target in zip(tensor.split(list(splits)), out.split(list(padded)), strict=True):
        target[: len(source)] = source


@exported
def fused_multi_row_unpadding(tensor, out, padded, splits) -> None:
    for source, target in zip(tensor.split(list(padded)), out.split(list(splits)), strict=True):
        target.copy_(source[: len(target)])
