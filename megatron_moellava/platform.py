"""CPU or CUDA: the only file that knows the difference.

On a GPU this file picks nccl and Transformer Engine and leaves everything else alone. Without one it lets
megatron-core, which documents no CPU path, run unchanged on CPU tensors and gloo: modules named `megatron.core.*` are
handed a facade of `torch` whose `cuda` member and device arguments mean the CPU. The rest of the process keeps the
real torch. `import megatron_moellava.platform` must come before the first import of megatron.core.

Every adaptation was needed: with one left out megatron-core 0.19.2 stops (docs/measurements/numerics.md has the places).
"""

import builtins
import contextlib
import ctypes
import importlib.machinery
import logging
import os
import random
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy
import torch

from megatron_moellava.compiled import fusible
from megatron_moellava.config import ConfigError
from megatron_moellava.machine import DEVICE, TRANSFORMER_IMPL, Machine, engine_found, is_installed

HAS_CUDA = torch.cuda.is_available()
ENGINE_FOUND = engine_found()
ENGINE_ASKED = os.environ.get(TRANSFORMER_IMPL, "auto")
HAS_TRANSFORMER_ENGINE = HAS_CUDA and ENGINE_FOUND == "whole" and ENGINE_ASKED != "local"
if ENGINE_FOUND == "half" or ENGINE_ASKED == "local":
    # megatron.core uses whatever it can import, in the router and the optimizer too. None: an import is an ImportError.
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
# Megatron-Core's output layer refuses to be built with the fusion unless apex's kernel is there.
HAS_GRADIENT_FUSION = HAS_TRANSFORMER_ENGINE and is_installed("fused_weight_gradient_mlp_cuda")
BACKEND = "nccl" if HAS_CUDA else "gloo"
ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


def _keep_freed_memory() -> None:
    """Torch's CPU allocator is malloc, and glibc's takes blocks of over 32 MB from the system and gives them back, each time.

    A MoE layer with 8,192 tokens met 270,000 page faults a pass so, a third of its time (docs/measurements/numerics.md).
    Now freed memory stays with the process, as it does with torch's allocator on a GPU. Other C libraries have no such
    switch.
    """
    trim_threshold, mmap_max = -1, -4  # numbers of <malloc.h>
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(mmap_max, 0)
        set_option(trim_threshold, -1)


if not HAS_CUDA:
    _keep_freed_memory()


def device() -> torch.device:
    """The device of this process: its own GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if HAS_CUDA else torch.device("cpu")


def claim_device(local_rank: int) -> None:
    """Bind this process to its GPU; on a CPU, share the cores between the processes of the node, unless OMP_NUM_THREADS
    says how many threads a process may have (torchrun sets it to 1 where the user has not).
    Raises ConfigError where the GPU or the modules that were asked for are missing."""
    if os.environ.get(DEVICE) == "cuda" and not HAS_CUDA:
        raise ConfigError("--device=cuda: torch finds no GPU here; use auto or cpu, or look at CUDA_VISIBLE_DEVICES")
    if ENGINE_ASKED == "transformer_engine" and not HAS_TRANSFORMER_ENGINE:
        raise ConfigError(f"transformer_impl=transformer_engine: {engine_sentence()}; use auto or local")
    if HAS_CUDA:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank} of this node has no GPU: there are {torch.cuda.device_count()}; start as many "
                "processes as GPUs (--nproc-per-node), or say CUDA_VISIBLE_DEVICES= to compute on the CPU"
            )
        torch.cuda.set_device(local_rank)
        _check_attention_variables()
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


def _check_attention_variables() -> None:
    """Megatron-Core sets these itself, to let Transformer Engine choose, and stops where they say something else."""
    for name in ATTENTION_VARIABLES:
        if HAS_TRANSFORMER_ENGINE and os.environ.get(name, "1") != "1":
            raise ConfigError(
                f"{name}={os.environ[name]}: Megatron-Core leaves the choice of the attention kernel to Transformer Engine and "
                "stops otherwise; unset it, or set training.transformer_impl=local for torch's attention"
            )


def machine() -> Machine:
    """This machine, as `validation` asks for it. Binds the process to its GPU, which alone knows what it can do."""
    known = Machine(
        has_gpu=HAS_CUDA,
        has_transformer_engine=HAS_TRANSFORMER_ENGINE,
        has_gradient_fusion=HAS_GRADIENT_FUSION,
        has_deep_ep=is_installed("deep_ep"),
    )
    if not HAS_CUDA:
        return known
    claim_device(int(os.environ.get("LOCAL_RANK", 0)))
    return replace(known, compute_capability=torch.cuda.get_device_capability())


def engine_sentence() -> str:
    """What was found of Transformer Engine, and which modules that means."""
    if HAS_TRANSFORMER_ENGINE:
        return "Transformer Engine's modules"
    if not HAS_CUDA:
        return "local modules (Transformer Engine needs a GPU)"
    if ENGINE_ASKED == "local":
        return "local modules, as transformer_impl=local asks for"
    if ENGINE_FOUND == "half":
        return (
            "local modules (Transformer Engine's library is installed without its extension for torch: a failed build?)"
        )
    return "local modules (Transformer Engine is not installed: no FP8, and its fused kernels are missing)"


def found() -> list[str]:
    """What a GPU run has to work with, one sentence each, for the head of its log; nothing on a CPU."""
    if not HAS_CUDA:
        return []
    apex_only = "on, but for the output layer (apex has its kernel)"
    fusion = "on" if HAS_GRADIENT_FUSION else apex_only if HAS_TRANSFORMER_ENGINE else "off"
    fused_adam = "Transformer Engine's" if HAS_TRANSFORMER_ENGINE else "apex's" if is_installed("apex") else "torch's"
    return [
        f"GPU {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, {BACKEND}",
        f"modules: {engine_sentence()}; Adam: {fused_adam}; gradient accumulation in the products: {fusion}; "
        f"DeepEP: {'yes' if is_installed('deep_ep') else 'no'}",
    ]


def exact_products(precision: str) -> None:
    """What is fp32 is fp32: no product rounds its operands to TF32, and no convolution of an fp32 model, which torch lets
    cuDNN do unless told."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


def to_device(values: list[int]) -> torch.Tensor:
    """Numbers of the host on the device (int64), without waiting for what the device is doing: torch.tensor(..., device)
    copies from pageable memory and waits for the whole queue."""
    return on_device(torch.tensor(values))


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    """The same on this process's device, without waiting for what that is doing: the copy comes from pinned memory."""
    if not HAS_CUDA or tensor.is_cuda:
        return tensor
    return tensor.pin_memory().to(device(), non_blocking=True)


def device_name() -> str | None:
    """What CUDA calls this process's GPU; None on a CPU."""
    return torch.cuda.get_device_name(device()) if HAS_CUDA else None


def gpus() -> list[tuple[str, int, tuple[int, int]]]:
    """(name, bytes of memory, compute capability) of each GPU of this process."""
    if not HAS_CUDA:
        return []
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [(one.name, one.total_memory, (one.major, one.minor)) for one in found]


def nccl_version() -> str:
    """Of the NCCL that torch was built with, on a GPU."""
    return ".".join(map(str, torch.cuda.nccl.version()))


class ToHost:
    """Numbers of the device on their way to the host: nothing waits for them before `read`, and nothing else then."""

    def __init__(self, values: list[torch.Tensor]):
        """`values`: single numbers, ready when the work queued so far is done."""
        self.values = torch.stack([value.detach().double() for value in values]).to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if HAS_CUDA else None
        if self.arrived is not None:
            self.arrived.record()

    def read(self) -> list[float]:
        """The values as Python numbers, in the order given; waits for them alone."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


def synchronize() -> None:
    """Wait for the device, so that a wall clock means something."""
    if HAS_CUDA:
        torch.cuda.synchronize()


@contextlib.contextmanager
def range_of(name: str) -> Iterator[None]:
    """A named range in what records this process: torch's profiler, and Nsight Systems (NVTX) on a GPU."""
    if HAS_CUDA:
        torch.cuda.nvtx.range_push(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if HAS_CUDA:
            torch.cuda.nvtx.range_pop()


def profiler_activities() -> list[torch.profiler.ProfilerActivity]:
    """What torch's profiler can see here: the host, and the GPU's kernels."""
    kinds = torch.profiler.ProfilerActivity
    sees_gpu = HAS_CUDA and kinds.CUDA in torch.profiler.supported_activities()
    return [kinds.CPU, kinds.CUDA] if sees_gpu else [kinds.CPU]


def record_memory() -> None:
    """From now on remember who allocates what on the GPU; nothing on a CPU."""
    if HAS_CUDA:
        torch.cuda.memory._record_memory_history(max_entries=100_000)


def save_memory(path: Path) -> None:
    """Write what `record_memory` remembers, for docs.pytorch.org/memory_viz, and stop; nothing on a CPU."""
    if HAS_CUDA:
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)


def debug(deterministic: bool, detect_anomaly: bool) -> None:
    """Switches of torch for the whole process: kernels whose result does not depend on the order in which threads end (an
    operation without one is named in a warning), and the forward operation behind a gradient that is NaN."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it alone
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # Transformer Engine's attention likewise
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    torch.autograd.set_detect_anomaly(detect_anomaly)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch of this process (megatron-core's trackers: `parallel.seed_model_parallel`)."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict:
    """Everything that `seed_everything` seeds, as tensors and plain data that torch.load reads with weights_only."""
    version, words, gauss = random.getstate()
    numpy_state = numpy.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        "torch": torch.get_rng_state(),
    }
    if HAS_CUDA:
        state["cuda"] = torch.cuda.get_rng_state()
    return state


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the host's generators as they are, whatever happens inside (torch's DataLoader draws a seed when it starts)."""
    state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        numpy.random.set_state(state[1])
        torch.set_rng_state(state[2])


def set_rng_state(state: dict) -> None:
    """Undo of `rng_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, words, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(words, dtype=numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if HAS_CUDA:
        torch.cuda.set_rng_state(state["cuda"])


def peak_memory_bytes() -> int:
    """Highest memory use so far: of the GPU's allocator, or of the process on a CPU."""
    if HAS_CUDA:
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory_bytes() -> int:
    """What the GPU of this process has left, counting what torch's allocator keeps for reuse. Not for a CPU."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


# --- megatron-core on a CPU -------------------------------------------------------------------------------------------


class _NoStream:
    """Stands for a CUDA stream or event: on a CPU everything is already in order."""

    def __init__(self, *args, **kwargs):
        self.cuda_stream = 0

    def _nothing(self, *args, **kwargs):
        return None

    wait_stream = wait_event = record = wait = synchronize = _nothing

    def record_event(self, event=None):
        return event or self

    def query(self) -> bool:
        return True


class _CpuGenerators:
    def __getitem__(self, index):
        return torch.default_generator


class _CpuCuda(types.ModuleType):
    """`torch.cuda` as megatron-core sees it on a CPU."""

    Stream = Event = _NoStream
    default_generators = _CpuGenerators()

    def __getattr__(self, name):
        return getattr(torch.cuda, name)

    def current_device(self):
        return torch.device("cpu")

    def current_stream(self, *args):
        return _NoStream()

    default_stream = current_stream

    def device(self, *args):
        return contextlib.nullcontext()

    stream = device

    def synchronize(self, *args):
        return None

    _lazy_init = empty_cache = set_device = reset_peak_memory_stats = synchronize

    def _lazy_call(self, function, **kwargs):
        function()

    def get_rng_state(self, *args, **kwargs):
        return torch.get_rng_state()

    def set_rng_state(self, state, *args, **kwargs):
        torch.set_rng_state(state)

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    @property
    def random(self):
        return self


class _CpuDistributed(types.ModuleType):
    """`torch.distributed` as megatron-core sees it on a CPU: gloo lacks two things that nccl has."""

    def __getattr__(self, name):
        return getattr(torch.distributed, name)

    def all_gather(self, outputs, tensor, group=None, async_op=False):
        """All-gather of unequal sizes (alltoall dispatcher with expert tensor parallelism): gloo wants them equal."""
        if len({output.shape for output in outputs}) == 1:
            return torch.distributed.all_gather(outputs, tensor, group=group, async_op=async_op)
        assert not async_op, "an uneven all-gather on gloo is synchronous"
        longest = max(output.shape[0] for output in outputs)
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in outputs]
        torch.distributed.all_gather(gathered, padded, group=group)
        for output, item in zip(outputs, gathered, strict=True):
            output.copy_(item[: output.shape[0]])
        return None

    def barrier(self, group=None, async_op=False, device_ids=None):
        return torch.distributed.barrier(group=group, async_op=async_op)


class _CpuTorch(types.ModuleType):
    """`torch` as megatron-core sees it on a CPU; whatever is not named here is torch's own."""

    cuda = _CpuCuda("torch.cuda")
    distributed = _CpuDistributed("torch.distributed")

    def __getattr__(self, name):
        return getattr(torch, name)

    # jit_fuser's compiler: on a CPU it takes seconds at first use, so that a run has to ask
    compile = staticmethod(fusible)


def _on_cpu(factory):
    def create(*args, device=None, **kwargs):
        is_cuda = isinstance(device, int) or str(device).startswith("cuda")
        return factory(*args, device=torch.device("cpu") if is_cuda else device, **kwargs)

    return staticmethod(create)


_FACTORIES = [
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
]
for _name in _FACTORIES:
    setattr(_CpuTorch, _name, _on_cpu(getattr(torch, _name)))

_TORCH = _CpuTorch("torch")
_FACADES = {"torch": _TORCH, "torch.cuda": _TORCH.cuda, "torch.distributed": _TORCH.distributed}

# Where megatron-core asks a tensor instead of torch, the question itself is rewritten: (module, old text, new text).
_TENSOR_TYPES = [("torch.cuda.HalfTensor", "torch.HalfTensor"), ("torch.cuda.BFloat16Tensor", "torch.BFloat16Tensor")]
_FLOAT_TYPE = ("torch.cuda.FloatTensor", "torch.FloatTensor")
_REWRITES = {
    "megatron.core.optimizer.optimizer": [*_TENSOR_TYPES, _FLOAT_TYPE, (".cuda()", "")],
    "megatron.core.optimizer.distrib_optimizer": [*_TENSOR_TYPES, _FLOAT_TYPE, (".cuda()", "")],
    "megatron.core.optimizer.clip_grads": [_FLOAT_TYPE],
    "megatron.core.models.common.language_module.language_module": [(".data.cuda()", ".data")],
    "megatron.core.dist_checkpointing.exchange_utils": [(".cuda()", "")],
    "megatron.core.transformer.moe.moe_utils": [  # all_to_all_single on gloo takes split sizes as lists, not tensors
        ("if torch.is_tensor(tensor) and tensor.is_cuda:", "if torch.is_tensor(tensor):"),
        ("if record_stream:", "if False:"),
    ],
}


def _import_with_facade(name, globals=None, locals=None, fromlist=(), level=0):
    module = builtins.__import__(name, globals, locals, fromlist, level)
    if level or name.partition(".")[0] != "torch":
        return module
    return _FACADES.get(name, module) if fromlist else _TORCH


class _CpuLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        module.__dict__["__builtins__"] = {**builtins.__dict__, "__import__": _import_with_facade}
        super().exec_module(module)

    def get_code(self, fullname):
        rewrites = _REWRITES.get(fullname)
        if not rewrites:
            return super().get_code(fullname)
        source = self.get_source(fullname) or ""
        for old, new in rewrites:
            assert old in source, f"{fullname} no longer contains {old!r}: megatron-core has changed, see platform.py"
            source = source.replace(old, new)
        return self.source_to_code(source, self.path)


class _CpuFinder:
    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if not fullname.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _CpuLoader(fullname, spec.loader.path)
        return spec


def _install() -> None:
    if "megatron.core" in sys.modules:
        raise ImportError(
            "import megatron_moellava before megatron.core: without a GPU megatron-core needs platform.py"
        )
    sys.meta_path.insert(0, _CpuFinder)


if not HAS_CUDA:
    _install()
# Megatron-core says at every start that Transformer Engine is missing and that some of its modules are experimental.
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated.*", category=FutureWarning)
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
warnings.filterwarnings("ignore", message=".*grad attribute of a Tensor that is not a leaf.*")
warnings.filterwarnings("ignore", message="The argument order of load has been changed")
warnings.filterwarnings("ignore", message="Please use DTensor instead and we are deprecating ShardedTensor")
# Its own warnings (deprecated classes, defaults it fills in) are about choices made in this package.
for _logger in ("megatron.core", "torch.utils.cpp_extension"):
    logging.getLogger(_logger).setLevel(logging.ERROR)
