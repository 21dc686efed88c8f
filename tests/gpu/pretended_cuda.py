"""`torch.cuda` of a machine with pretended GPUs: one queue that is always empty, one generator, plenty of memory."""

import contextlib
import types

import torch
import torch.profiler

GIB = 2**30


class Stream:
    """A stream or an event: what was queued is done. Waiting for it is a wait of the host."""

    cuda_stream = 0

    def __init__(self, *args, **kwargs):
        pass

    def _nothing(self, *args, **kwargs) -> None:
        return None

    wait_stream = wait_event = record = wait = _nothing

    def synchronize(self) -> None:
        from tests.gpu.pretended import note

        note("synchronize")

    def record_event(self, event=None):
        return event or self

    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        return 0.0

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        return None


class _Device(contextlib.nullcontext):
    def __init__(self, *args):
        super().__init__()


def install_cuda(gpus: int) -> None:
    def set_device(device) -> None:
        index = device.index if isinstance(device, torch.device) else int(str(device).removeprefix("cuda:"))
        if (index or 0) >= gpus:
            raise RuntimeError(f"CUDA error: invalid device ordinal (device {index} of {gpus})")

    def seed(number: int) -> None:
        torch.default_generator.manual_seed(int(number) % 2**63)

    def nothing(*args, **kwargs) -> None:
        return None

    cuda = torch.cuda
    properties = types.SimpleNamespace(
        name="pretended H200", major=9, minor=0, multi_processor_count=132, total_memory=141 * GIB, warp_size=32
    )
    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": gpus,
        "current_device": 0,
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "mem_get_info": (140 * GIB, 141 * GIB),
        "get_device_capability": (9, 0),
        "get_device_name": "pretended H200",
        "get_device_properties": properties,
        "stream": contextlib.nullcontext(),
        "current_stream": Stream(),
        "default_stream": Stream(),
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *args, answer=answer, **kwargs: answer)
    for name in ("_lazy_init", "empty_cache", "reset_peak_memory_stats", "ipc_collect", "set_stream"):
        setattr(cuda, name, nothing)
    cuda.set_device, cuda.synchronize = set_device, Stream().synchronize
    cuda.Stream = cuda.Event = Stream
    cuda.device = _Device
    cuda._lazy_call = lambda function, **kwargs: function()
    cuda.manual_seed = cuda.manual_seed_all = seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.initial_seed = torch.initial_seed
    cuda.default_generators = (torch.default_generator,)
    for name in (
        "get_rng_state",
        "set_rng_state",
        "manual_seed",
        "manual_seed_all",
        "current_device",
        "_lazy_call",
        "_lazy_init",
    ):
        setattr(cuda.random, name, getattr(cuda, name))
    torch.profiler.supported_activities = lambda: {torch.profiler.ProfilerActivity.CPU}
    cuda.nvtx.range_push = cuda.nvtx.range_pop = cuda.nvtx.mark = nothing
    for name in ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check"):
        if hasattr(torch.optim.Optimizer, name):
            setattr(torch.optim.Optimizer, name, nothing)
