"""`transformer_engine_torch` on a CPU: the functions that Transformer Engine 2.20's Python code calls (FP8: engine_fp8.py).

Each checks what its kernel checks: operands of a product have one type, norms have weights of their input's type, angles
are fp32. Products are summed in fp32. A function that is not here raises when it is called, not when it is imported.
"""

import collections
import enum
import types
from collections.abc import Callable

import torch

accumulated: collections.Counter[str] = collections.Counter()  # products that were added to what had been there
NOT_THERE = "not part of the stand-in for Transformer Engine's extension"


class _Members(type):
    """An enumeration whose members are numbered as they are first asked for; their numbers mean nothing here."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        cls.__members__[name] = len(cls.__members__)  # type: ignore[attr-defined]
        setattr(cls, name, cls.__members__[name])  # type: ignore[attr-defined]
        return cls.__members__[name]  # type: ignore[attr-defined]


def missing(module: types.ModuleType, name: str):
    """What the extension has and the stand-in has not: an enumeration, or a function that says so."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        found: object = _Members(name, (), {"__members__": {}})
    else:

        def found(*args, **kwargs):
            raise NotImplementedError(f"{name}: {NOT_THERE}")

    setattr(module, name, found)
    return found


def exported(function):
    """A member of the extension."""
    function.is_of_the_extension = True
    return function


@exported
class DType(enum.IntEnum):
    """Types of the extension."""

    kByte, kInt32, kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kFloat8E5M2, kFloat4E2M1 = range(8)


def numbered(name: str, *kinds: str) -> type:
    """Places of three products' tensors in lists: GEMM1_INPUT, GEMM1_WEIGHT, ..."""
    members = [kind.format(product) for product in (1, 2, 3) for kind in kinds]
    return exported(enum.IntEnum(name, [(member, place) for place, member in enumerate(members)]))


FP8FwdTensors = numbered("FP8FwdTensors", "GEMM{}_INPUT", "GEMM{}_WEIGHT", "GEMM{}_OUTPUT")
FP8BwdTensors = numbered("FP8BwdTensors", "GRAD_OUTPUT{}", "GRAD_INPUT{}")
TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


def gradients(function: Callable, inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """Of `function`, computed in fp32, in the types of its inputs."""
    with torch.enable_grad():
        copies = [item.detach().float().requires_grad_() for item in inputs]
        found = torch.autograd.grad(function(*copies), copies, grad.float())
    return [item.to(source.dtype) for item, source in zip(found, inputs, strict=True)]


# --- versions ---------------------------------------------------------------------------------------------------------


@exported
def get_cublasLt_version() -> int:
    return 130000


@exported
def get_cudnn_version() -> int:
    return 91900


@exported
def get_num_cublas_streams() -> int:
    return 4


@exported
def get_stream_priority_range(*args) -> tuple[int, int]:
    return 0, -5


# --- products ---------------------------------------------------------------------------------------------------------


def rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def product(a: torch.Tensor, transpose_a: bool, b: torch.Tensor, transpose_b: bool) -> torch.Tensor:
    """op(b) op(a) in fp32: the row-major reading of cuBLAS's column-major product. FP8 operands are read along rows only."""
    from tests.gpu.engine_fp8 import is_quantized, side_of

    if is_quantized(a) and is_quantized(b):
        return side_of(b, transpose_b) @ side_of(a, not transpose_a).t()
    if is_quantized(a) or is_quantized(b) or a.dtype != b.dtype:
        raise RuntimeError(
            f"Unable to find suitable cuBLAS GEMM algorithm: {type(a)} {a.dtype} with {type(b)} {b.dtype}"
        )
    left, right = rows(b).float(), rows(a).float()
    return (left.t() if transpose_b else left) @ (right.t() if transpose_a else right)


def column_sums(b) -> torch.Tensor:
    """Of an operand in whatever type, for gradients of biases."""
    from tests.gpu.engine_fp8 import is_quantized, side_of

    return (side_of(b, False) if is_quantized(b) else rows(b).float()).sum(0)


def store(out: torch.Tensor, value: torch.Tensor, accumulate: bool) -> None:
    value = value.reshape(out.shape)
    if accumulate:
        accumulated["products"] += 1
        out.add_(value)
    else:
        out.copy_(value)


@exported
def generic_gemm(
    A, transa, B, transb, D, quantizer, out_dtype, bias, bias_dtype, gelu, gelu_in, grad, workspace, size, accumulate,
    split, *, comm_overlap, comm_type, extra_output, bulk_overlap, alpha, beta,
):  # fmt: skip
    assert quantizer is None and not gelu and comm_overlap is None, NOT_THERE
    value, bias_grad = alpha * product(A, transa, B, transb), None
    if bias is not None and grad:
        bias_grad = column_sums(B).to(bias.dtype)
    elif bias is not None:
        value = value + bias.float()
    if D is None:
        shape = value.shape if transb else (*tuple(B.size())[:-1], value.shape[-1])
        return value.to(A.dtype if out_dtype is None else TORCH[out_dtype]).reshape(shape), bias_grad, None, None
    store(D, value, accumulate)
    return D, bias_grad, None, None


@exported
def te_general_grouped_gemm(
    A, transa, B, transb, out, out_dtype, m_splits, bias, bias_dtype, single_output, gelu_in, grad, workspaces, size,
    accumulate, split, sm_count,
):  # fmt: skip
    outputs = out[0].split(m_splits) if single_output else out
    for a, b, output, one_bias in zip(A, B, outputs, bias, strict=True):
        if not output.numel():
            continue
        if 0 in tuple(b.size()):  # an expert without tokens
            if not accumulate:
                output.zero_()
            if grad and one_bias.numel():
                one_bias.zero_()
            continue
        value = product(a, transa, b, transb)
        if one_bias.numel() and grad:
            one_bias.copy_(column_sums(b))
        elif one_bias.numel():
            value = value + one_bias.float()
        store(output, value, accumulate)
    return bias


# --- norms ------------------------------------------------------------------------------------------------------------


def layer_norm(x, weight, bias, eps, zero_centered):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight + int(zero_centered), bias, eps)


def rms_norm(x, weight, eps, zero_centered):
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight + int(zero_centered), eps)


def normalized(value: torch.Tensor, out: torch.Tensor | None, quantizer, out_dtype: DType) -> torch.Tensor:
    from tests.gpu.engine_fp8 import quantize

    if quantizer is not None:
        return quantize(value.to(TORCH[out_dtype]), quantizer, out)
    return value.to(TORCH[out_dtype]) if out is None else out.copy_(value)


@exported
def layernorm_fwd(x, weight, bias, eps, out, quantizer, out_dtype, margin, zero_centered):
    assert x.dtype == weight.dtype == bias.dtype and x.dim() == 2, (x.dtype, weight.dtype)
    value = layer_norm(x.float(), weight.float(), bias.float(), eps, zero_centered)
    variance, mean = torch.var_mean(x.float(), -1, correction=0)
    return normalized(value, out, quantizer, out_dtype), mean, (variance + eps).rsqrt()


@exported
def layernorm_bwd(grad, x, mean, rsigma, weight, margin, zero_centered):
    def standardized(x, weight, bias):
        centred = x - x.mean(-1, keepdim=True)
        # The derivative of 1/sigma needs eps, which the kernel finds in rsigma.
        eps = (rsigma**-2 - (centred.detach() ** 2).mean(-1))[:, None]
        return centred * ((centred**2).mean(-1, keepdim=True) + eps).rsqrt() * (weight + int(zero_centered)) + bias

    return gradients(standardized, [x, weight, torch.zeros_like(weight)], grad)


@exported
def rmsnorm_fwd(x, weight, eps, out, quantizer, out_dtype, margin, zero_centered):
    assert x.dtype == weight.dtype and x.dim() == 2, (x.dtype, weight.dtype)
    value = rms_norm(x.float(), weight.float(), eps, zero_centered)
    return normalized(value, out, quantizer, out_dtype), None, ((x.float() ** 2).mean(-1) + eps).rsqrt()


@exported
def rmsnorm_bwd(grad, x, rsigma, weight, margin, zero_centered):
    def standardized(x, weight):
        square = (x**2).mean(-1, keepdim=True)
        eps = rsigma[:, None] ** -2 - square.detach()
        return x * (square + eps).rsqrt() * (weight + int(zero_centered))

    return gradients(standardized, [x, weight], grad)


# --- optimizers -------------------------------------------------------------------------------------------------------


@exported
def multi_tensor_l2norm(chunk, noop, lists, per_tensor=False):
    norms = torch.stack([item.float().norm() for item in lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else norms.new_empty(0)


@exported
def multi_tensor_scale(chunk, noop, lists, scale) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * scale)


multi_tensor_scale_tensor = multi_tensor_scale


@exported
def multi_tensor_adam(chunk, noop, lists, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay) -> None:
    """AdamW where `mode` is 1, Adam with L2 where it is 0."""
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, parameter, average, square in zip(*lists[:4], strict=True):
        grad, before = grad.float(), parameter.float()
        if not mode:
            grad = grad + weight_decay * before
        average.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (average / first) / ((square / second).sqrt() + eps)
        if mode:
            update = update + weight_decay * before
        parameter.copy_(before - lr * update)
