"""What kind of work an operation or a kernel is, by its name; and a profile summed up by it. Free of torch."""

from collections.abc import Iterable

OTHER = "elementwise and other"
GPU_PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "cudnn::cnn")  # in the names of kernels
KINDS = (  # parts of names; the first match counts
    ("compiled kernels", ("compiledfxgraph", "triton_")),  # of torch.compile, on a CPU and on a GPU
    ("communication", ("gloo", "c10d", "nccl", "all_reduce", "all_gather", "reduce_scatter")),
    ("attention", ("scaled_dot_product", "flash_attention", "flash_fwd", "flash_bwd", "fmha", "sdpa")),
    ("GEMM", ("::mm", "::addmm", "::bmm", "::baddbmm", "grouped_mm", "mkldnn", "convolution", *GPU_PRODUCTS)),
    ("optimizer", ("_foreach", "adam", "::lerp", "::addcdiv", "::addcmul", "::sqrt", "vector_norm", "multi_tensor")),
    ("norms", ("layer_norm", "rms_norm", "rsqrt")),
    ("softmax and loss", ("softmax", "::exp", "::log", "nll", "cross_entropy", "logsumexp")),
    ("activation", ("silu", "gelu")),
    ("routing", ("topk", "sort", "index", "scatter", "gather", "masked", "nonzero", "cumsum", "bincount", "embedding")),
    ("copies", ("copy", "::cat", "stack", "clone", "contiguous", "zero", "fill", "memcpy", "memset", "catarray")),
)


def kind_of(name: str) -> str:
    """Of an operation (aten::mm) or a kernel (nvjet_sm90_...)."""
    name = name.lower()
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), OTHER)


def by_kind(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Sums of (name, time) pairs, the largest first."""
    kinds: dict[str, float] = {}
    for name, value in times:
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + value
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))
