"""What this device has, and whether the kernels of a run do what a CPU does: python -m benchmarks.gpu_kernels [SIZE]

Each is called as the program calls it, in bf16 and with the awkward sizes (an expert without tokens, one key-value head for
many queries), forward and backward, and compared with the CPU in fp32. Prints one JSON object; a kernel that fails has
its message there, and the others go on.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.measure import finish
from megatron_moellava import parallel, platform
from megatron_moellava.config import ParallelConfig


def experts(x_ND, weight_EFD):
    """Four groups, one of them empty."""
    ends = torch.tensor([5, 5, 30, 48], dtype=torch.int32, device=x_ND.device)
    return F.grouped_mm(x_ND, weight_EFD.transpose(1, 2), offs=ends)


def causal(q_BHSD, k_BGSD, v_BGSD):
    return F.scaled_dot_product_attention(q_BHSD, k_BGSD, v_BGSD, is_causal=True, enable_gqa=True)


def masked(q_BHSD, k_BGSD, v_BGSD):
    """Causal, and the last third of the keys is padding."""
    length = q_BHSD.shape[-2]
    mask = torch.ones(length, length, dtype=torch.bool, device=q_BHSD.device).tril()
    mask[:, -length // 3 :] = torch.eye(length, dtype=torch.bool, device=q_BHSD.device)[:, -length // 3 :]
    return F.scaled_dot_product_attention(q_BHSD, k_BGSD, v_BGSD, attn_mask=mask, enable_gqa=True)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def attention_inputs(head: int, length: int = 300) -> list[torch.Tensor]:
    return [numbers(2, 8, length, head), numbers(2, 2, length, head), numbers(2, 2, length, head)]


# name: (function, inputs, dtype, largest relative error)
CHECKS: dict[str, tuple[Callable, list[torch.Tensor], torch.dtype, float]] = {
    "grouped_mm": (experts, [numbers(48, 64), numbers(4, 96, 64)], torch.bfloat16, 2e-2),
    "attention, heads of 64": (causal, attention_inputs(64), torch.bfloat16, 2e-2),
    "attention, heads of 72": (causal, attention_inputs(72), torch.bfloat16, 2e-2),
    "attention, heads of 80": (causal, attention_inputs(80), torch.bfloat16, 2e-2),
    "attention, heads of 128": (causal, attention_inputs(128), torch.bfloat16, 2e-2),
    "attention with a mask": (masked, attention_inputs(64), torch.bfloat16, 2e-2),
    "fp32 product": (torch.matmul, [numbers(256, 512), numbers(512, 256)], torch.float32, 1e-5),
    "fp32 convolution": (
        lambda x, w: F.conv2d(x, w, stride=14),
        [numbers(2, 3, 56, 56), numbers(64, 3, 14, 14)],
        torch.float32,
        1e-5,
    ),
    "layer norm": (lambda x: F.layer_norm(x, x.shape[-1:]), [numbers(64, 640)], torch.bfloat16, 2e-2),
}


def error_of(name: str) -> float:
    """Of output and gradients, the largest relative one."""
    function, inputs, dtype, _ = CHECKS[name]
    results = []
    for device, kind in ((torch.device("cpu"), torch.float32), (platform.device(), dtype)):
        copies = [item.to(dtype).to(kind).to(device).requires_grad_() for item in inputs]
        output = function(*copies)
        gradients = torch.autograd.grad(output, copies, numbers(*output.shape).flip(-1).to(output))
        results.append([item.detach().float().cpu() for item in (output, *gradients)])
    return max(float((found - expected).norm() / expected.norm()) for expected, found in zip(*results, strict=True))


def check(name: str) -> dict:
    try:
        error = error_of(name)
    except Exception as problem:
        return {"failed": f"{type(problem).__name__}: {str(problem)[:500]}"}
    return {"error": error} if error < CHECKS[name][3] else {"failed": f"relative error {error:.2g}"}


def ceilings(size: int) -> dict:
    """Rates that nothing on this device exceeds: a large bf16 product, and a copy."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=platform.device()) for _ in range(2))
    return {
        "product TFLOP/s": 2 * size**3 / seconds(lambda: a @ b) / 1e12,
        "copy GB/s": 2 * a.numel() * 2 / seconds(lambda: b.copy_(a)) / 1e9,
    }


def seconds(action: Callable[[], object], rounds: int = 10) -> float:
    taken = []
    for _ in range(3 + rounds):
        platform.synchronize()
        started = time.perf_counter()
        action()
        platform.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[3:])


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 8192
    parallel.initialize(ParallelConfig(), seed=1)
    platform.exact_products("fp32")
    total = torch.ones(3, device=platform.device())
    dist.all_reduce(total)
    result = {"found": platform.found(), "kernels": {name: check(name) for name in CHECKS}, "rates": ceilings(size)}
    parallel.shutdown()
    finish(result)


if __name__ == "__main__":
    main()
