"""Attention and rotation of `transformer_engine_torch` on a CPU. The fused kernel's inputs are lengths and a type of mask:
a mask as a tensor never reaches it."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.gpu.engine_extension import NOT_THERE, exported, gradients


@exported
def get_fused_attn_backend(params):
    """cuDNN's: 16-bit values, heads of up to 256 in steps of 8."""
    import transformer_engine_torch as extension

    backends = extension.NVTE_Fused_Attn_Backend
    sizes = (params.head_dim_qk, params.head_dim_v)
    if all(size % 8 == 0 and size <= 256 for size in sizes):
        return backends.NVTE_F16_arbitrary_seqlen, ""
    return backends.NVTE_No_Backend, f"heads of {sizes}"


def name_of(members, number: int) -> str:
    return next(name for name, value in members.__members__.items() if value == number)


def attend(q, k, v, scale, layout, mask, lengths) -> torch.Tensor:
    """q, k and v in the layout's order, which is the result's, too."""
    order = layout.removeprefix("NVTE_")[0]  # SB3HD, BSHD_BSHD_BSHD, THD_THD_THD, ...: q, k and v come apart anyway
    if order == "T":
        assert "PADDING" in mask and lengths is not None, (layout, mask)
        parts = [item.split(lengths) for item in (q, k, v)]
        return torch.cat([attend_rows(*part, scale, "CAUSAL" in mask) for part in zip(*parts, strict=True)])
    assert "PADDING" not in mask, NOT_THERE
    first = {"S": 1, "B": 0}[order]
    outputs = [
        attend_rows(*(item.select(first, number) for item in (q, k, v)), scale, "CAUSAL" in mask)
        for number in range(q.shape[first])
    ]
    return torch.stack(outputs, first)


def attend_rows(q_SHD, k_SHD, v_SHD, scale, causal) -> torch.Tensor:
    q, k, v = (item.transpose(0, 1)[None] for item in (q_SHD, k_SHD, v_SHD))
    attended = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    return attended[0].transpose(0, 1)


def checked(layout, mask, bias, softmax, window, q, cu_seqlens) -> tuple[str, str, list[int] | None]:
    """Names of layout and mask, and lengths of packed sequences."""
    import transformer_engine_torch as extension

    assert name_of(extension.NVTE_Bias_Type, bias) == "NVTE_NO_BIAS"
    assert name_of(extension.NVTE_Softmax_Type, softmax) == "NVTE_VANILLA_SOFTMAX"
    assert q.dtype in (torch.bfloat16, torch.float16) and cu_seqlens.dtype == torch.int32
    assert tuple(window) in ((-1, -1), (-1, 0)), window
    layout_name, mask_name = name_of(extension.NVTE_QKV_Layout, layout), name_of(extension.NVTE_Mask_Type, mask)
    if not layout_name.startswith("NVTE_T"):
        return layout_name, mask_name, None
    return layout_name, mask_name, lengths_of(cu_seqlens)


def lengths_of(cu_seqlens: torch.Tensor) -> list[int]:
    """What a kernel reads on the device: no wait of the host."""
    from tests.gpu.pretended import without_notes

    with without_notes():
        return cu_seqlens.diff().tolist()


@exported
def fused_attn_fwd(
    max_q, max_kv, is_training, scale, dropout, fast_zero, layout, out_format, scale_format, bias, mask, softmax,
    window, bottom_right, cu_q, cu_kv, q, k, v, fake_dtype, padded_q, padded_kv, pages_k, pages_v, s_quantizer,
    o_quantizer, attention_bias, softmax_offset, generator, rng_elements, return_max, cuda_graph,
):  # fmt: skip
    assert dropout == 0 and s_quantizer is None and pages_k is None and not return_max, NOT_THERE
    names = checked(layout, mask, bias, softmax, window, q, cu_q)
    out = attend(q.float(), k.float(), v.float(), scale, *names).to(q.dtype).contiguous()
    return [out, q.new_zeros(1, dtype=torch.float32), q.new_zeros(2, dtype=torch.int64)]


@exported
def fused_attn_bwd(
    max_q, max_kv, scale, dropout, fast_zero, layout, out_format, grad_format, grads_layout, scale_format,
    grad_scale_format, bias, mask, softmax, window, bottom_right, deterministic, cu_q, cu_kv, q, k, v, out, grad,
    fake_dtype, saved, padded_q, padded_kv, s_quantizer, dp_quantizer, dqkv_quantizer, cuda_graph,
):  # fmt: skip
    names = checked(layout, mask, bias, softmax, window, q, cu_q)
    return gradients(lambda q, k, v: attend(q, k, v, scale, *names), [q, k, v], grad.reshape(out.shape))


@exported
def convert_thd_to_bshd(tensor, cu_seqlens, batch, longest):
    out, start = tensor.new_zeros(batch, longest, *tensor.shape[1:]), 0
    for row, length in enumerate(lengths_of(cu_seqlens)):
        out[row, :length] = tensor[start : start + length]
        start += length
    return out


@exported
def convert_bshd_to_thd(tensor, cu_seqlens, tokens):
    parts = [row[:length] for row, length in zip(tensor, lengths_of(cu_seqlens), strict=True)]
    out = torch.cat(parts)
    return torch.cat([out, out.new_zeros(tokens - len(out), *out.shape[1:])])


def rotate(tensor, angles, cu_seqlens):
    if cu_seqlens is None:
        angles = angles[: len(tensor)]
    else:
        angles = torch.cat([angles[:length] for length in lengths_of(cu_seqlens)])[:, 0]
    size = angles.shape[-1]
    turned, rest = tensor[..., :size], tensor[..., size:]
    low, high = turned.chunk(2, -1)
    return torch.cat([turned * angles.cos() + torch.cat([-high, low], -1) * angles.sin(), rest], -1)


def check_rotation(tensor, angles, starts, format, interleaved, cu_seqlens, processes) -> None:
    import transformer_engine_torch as extension

    assert starts is None and not interleaved and processes == 1, NOT_THERE
    assert angles.dtype == torch.float32 and (cu_seqlens is None or cu_seqlens.dtype == torch.int32)
    expected = extension.NVTE_QKV_Format.NVTE_SBHD if cu_seqlens is None else extension.NVTE_QKV_Format.NVTE_THD
    assert format == expected and tensor.dim() == (4 if cu_seqlens is None else 3)


@exported
def fused_rope_forward(tensor, angles, starts, format, interleaved, cu_seqlens, processes, rank):
    check_rotation(tensor, angles, starts, format, interleaved, cu_seqlens, processes)
    return rotate(tensor.float(), angles, cu_seqlens).to(tensor.dtype)


@exported
def fused_rope_backward(grad, angles, starts, format, interleaved, cu_seqlens, processes, rank):
    check_rotation(grad, angles, starts, format, interleaved, cu_seqlens, processes)
    return gradients(lambda tensor: rotate(tensor, angles, cu_seqlens), [grad], grad)[0]
