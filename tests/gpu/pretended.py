"""The GPU's code path on a machine without one: the numbers of a CPU, the rules of a GPU.

Tensors are ordinary CPU tensors; the storages that would live on the GPU are tagged. `torch.cuda` says that there is one,
`tensor.device` says cuda:0 for what is tagged, an operation on tensors of both devices raises, and every wait of the host
for the device is counted with its place. `install()` must run before megatron_moellava.platform is imported; `groups.py`
has nccl's rules. What it cannot show: kernels, their limits, their numerics, and speed.
"""

import collections
import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
OURS = "megatron_moellava/"
CROSSING = {"copy_", "_to_copy", "set_", "_local_scalar_dense", "is_same_size", "_has_compatible_shallow_copy_type"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "equal"}
FACTORIES = (
    *("empty", "zeros", "ones", "full", "rand", "randn", "randint", "arange", "tensor", "as_tensor", "eye", "linspace"),
    *("empty_strided", "randperm"),
)
LIKE = ["empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"]
NEW = ["new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"]
HOST = ["item", "tolist", "__bool__", "__int__", "__float__", "__index__"]
TYPES = {torch.float32: "Float", torch.bfloat16: "BFloat16", torch.float16: "Half", torch.int64: "Long"}

waits: collections.Counter[str] = collections.Counter()  # "file:function what" -> times
_tags: dict[int, StorageWeakRef] = {}
_free: dict[int, StorageWeakRef] = {}  # made inside torch for whatever device is wanted: a gradient that is missing
_quiet = [0]


class MixedDevices(RuntimeError):
    """What CUDA says to tensors of two devices."""


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()


def _is_in(tags: dict[int, StorageWeakRef], tensor: torch.Tensor) -> bool:
    try:
        reference = tags.get(_storage(tensor)._cdata)
    except (NotImplementedError, RuntimeError):  # a tensor without storage: sparse, or a subclass's shell
        return False
    return reference is not None and not reference.expired()


def is_shell(tensor: torch.Tensor) -> bool:
    """A subclass without storage; those inside of it have their own tags."""
    return type(tensor) not in (torch.Tensor, torch.nn.Parameter) and hasattr(tensor, "is_shell_on_gpu")


def on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_shell_on_gpu if is_shell(tensor) else _is_in(_tags, tensor)


def tag(tensor: torch.Tensor) -> torch.Tensor:
    """This tensor's storage is on the GPU."""
    if is_shell(tensor):
        return tensor
    storage = _storage(tensor)
    _tags[storage._cdata] = StorageWeakRef(storage)
    if len(_tags) % 20_000 == 0:
        for key in [key for key, reference in _tags.items() if reference.expired()]:
            del _tags[key]
    return tensor


def untag(tensor: torch.Tensor) -> torch.Tensor:
    assert not is_shell(tensor), "a quantized tensor stays where it is"
    _tags.pop(_storage(tensor)._cdata, None)
    return tensor


def place() -> str:
    """The innermost function of this project, of megatron-core or of the tests; "step " before it inside of a step."""
    frame, found, is_step = sys._getframe(1), "", False
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        root = next((root for root in (OURS, "megatron/core/", "tests/") if root in file), None)
        if root and not found and "tests/gpu/pretended" not in file:
            found = f"{root}{file.rpartition(root)[2]}:{name}"
        is_step = is_step or (name == "step" and OURS in file)
        frame = frame.f_back  # type: ignore[assignment]
    return ("step " if is_step else "") + (found or "elsewhere")


def note(what: str) -> None:
    """Count a wait of the host."""
    if not _quiet[0]:
        waits[f"{place()} {what}"] += 1


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    _quiet[0] += 1
    try:
        yield
    finally:
        _quiet[0] -= 1


class Devices(TorchDispatchMode):
    """Results are where their operands are, and operands are in one place."""

    def __torch_dispatch__(self, func, types_, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
        is_gpu = func.namespace != "c10d" and any(on_gpu(item) for item in tensors)
        if is_gpu:
            self._check(func, name, args, tensors)
        output = func(*args, **kwargs)
        if not tensors and name in ("zeros", "ones", "full", "empty"):
            storage = _storage(output)
            _free[storage._cdata] = StorageWeakRef(storage)
        if is_gpu and name == "copy_" and not on_gpu(args[0]):
            note("copy to the host")
        elif is_gpu and name != "_local_scalar_dense":
            for item in tree_leaves(output):
                if isinstance(item, torch.Tensor):
                    tag(item)
        return output

    def _check(self, func, name: str, args: tuple, tensors: list[torch.Tensor]) -> None:
        checked = tensors
        if name in INDEXING:  # an index may be on the host
            checked = [args[0], *(args[2:3] if isinstance(args[-1], torch.Tensor) else ())]
            is_mask = any(isinstance(item, torch.Tensor) and item.dtype == torch.bool for item in args[1] or ())
            is_filled = len(args) > 2 and args[2].numel() == 1 and not on_gpu(args[2])  # torch fills by the mask then
            if is_mask and not is_filled:
                note("boolean index")
        if name not in CROSSING and any(
            item.dim() and not on_gpu(item) and not _is_in(_free, item) for item in checked
        ):
            where = [f"{tuple(item.shape)} on {'cuda' if on_gpu(item) else 'cpu'}" for item in tensors]
            raise MixedDevices(
                f"Expected all tensors to be on the same device: {func} of {', '.join(where)} at {place()}"
            )
        if name in WAITING:
            note(name)


def is_cuda(device) -> bool:
    return (isinstance(device, int) and not isinstance(device, bool)) or str(device).startswith("cuda")


def moved(tensor: torch.Tensor, to_gpu: bool) -> torch.Tensor:
    """A copy on the other device, in the graph."""
    return (tag if to_gpu else untag)(tensor.clone())


def _to(original: Callable, tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    target, rest = kwargs.pop("device", None), []
    for item in args:
        if isinstance(item, torch.Tensor):
            target, item = item.device, item.dtype
        elif isinstance(item, torch.device | str) or (
            isinstance(item, int) and not isinstance(item, bool) and not rest
        ):
            target = item
            continue
        rest.append(item)
    is_waiting = not kwargs.pop("non_blocking", False)
    rest = [item for item in rest if not isinstance(item, bool)]
    output = original(tensor, *rest, **kwargs) if rest or kwargs.keys() - {"copy"} else tensor
    if kwargs.get("copy") and output is tensor:
        output = tensor.clone()
    is_elsewhere = target is not None and is_cuda(target) != on_gpu(tensor)
    if is_elsewhere and is_waiting:  # to the device: from pageable memory, as "tensor(values, device)"
        note("to the device" if is_cuda(target) else "to the host")
    return moved(output, is_cuda(target)) if is_elsewhere else output


def _numpy(original: Callable, tensor: torch.Tensor, *args, **kwargs):
    if on_gpu(tensor):
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy, at {place()}")
    return original(tensor, *args, **kwargs)


def _host(name: str, original: Callable, tensor: torch.Tensor, *args, **kwargs):
    if not on_gpu(tensor):
        return original(tensor, *args, **kwargs)
    note(name.strip("_"))
    with without_notes():
        return original(tensor, *args, **kwargs)


def _like(original: Callable, tensor: torch.Tensor, *args, device=None, **kwargs) -> torch.Tensor:
    output = original(tensor, *args, **kwargs)
    return (tag if (on_gpu(tensor) if device is None else is_cuda(device)) else untag)(output)


def _factory(name: str, original: Callable, *args, device=None, **kwargs) -> torch.Tensor:
    source = args[0] if args else kwargs.get("data")
    if isinstance(source, torch.Tensor) and name in ("tensor", "as_tensor"):
        output = original(*args, **kwargs)
        return output if device is None or is_cuda(device) == on_gpu(source) else moved(output, is_cuda(device))
    output = original(*args, device=None if device is None or is_cuda(device) else device, **kwargs)
    _free.pop(_storage(output)._cdata, None)
    if device is not None and is_cuda(device):
        if name in ("tensor", "as_tensor"):
            note("tensor(values, device)")  # from pageable memory: waits for the queue
        tag(output)
    return output


def _in_thread(original: Callable, thread: threading.Thread) -> None:
    with Devices():  # modes belong to a thread
        original(thread)


def _histc(original: Callable, tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    if not on_gpu(tensor) or tensor.is_floating_point():
        return original(tensor, *args, **kwargs)
    return original(tensor.float(), *args, **kwargs).to(tensor.dtype)  # CUDA counts integers, too


def _shell(original: Callable, *args, device=None, **kwargs) -> torch.Tensor:
    """A subclass that only looks like a tensor: torch must not think of it as one of a real GPU."""
    shell = original(*args, device=CPU if device is None or is_cuda(device) else device, **kwargs)
    shell.is_shell_on_gpu = device is not None and is_cuda(device)
    return shell


def _type(original: Callable, tensor: torch.Tensor, *args, **kwargs):
    asked = not args and not kwargs and on_gpu(tensor)
    return f"torch.cuda.{TYPES.get(tensor.dtype, 'Other')}Tensor" if asked else original(tensor, *args, **kwargs)


def _patch(owner, name: str, wrapper: Callable) -> None:
    """Plain wrappers: a TorchFunctionMode is off inside autograd functions and custom operators."""
    original = getattr(owner, name)

    def call(*args, **kwargs):
        return wrapper(original, *args, **kwargs)

    call.__name__ = name
    setattr(owner, name, call)


def install(gpus: int = 1) -> None:
    """Pretend from now on, for the rest of the process."""
    from tests.gpu.pretended_cuda import install_cuda
    from tests.gpu.pretended_groups import install_groups

    install_cuda(gpus)
    tensor = torch.Tensor
    real_device = tensor.device.__get__  # type: ignore[attr-defined]
    tensor.device = property(lambda self: CUDA if on_gpu(self) else real_device(self))  # type: ignore[assignment]
    tensor.is_cuda = property(on_gpu)  # type: ignore[assignment]
    tensor.is_cpu = property(lambda self: not on_gpu(self))  # type: ignore[assignment]
    _patch(tensor, "to", _to)
    _patch(tensor, "cuda", lambda original, self, *args, **kwargs: self.to(CUDA))
    _patch(tensor, "cpu", lambda original, self, *args, **kwargs: self.to(CPU))
    _patch(tensor, "pin_memory", lambda original, self, *args: self)
    _patch(tensor, "is_pinned", lambda original, self, *args: False)
    _patch(tensor, "record_stream", lambda original, self, stream: None)
    _patch(tensor, "get_device", lambda original, self: 0 if on_gpu(self) else -1)
    _patch(tensor, "type", _type)
    for name in ("numpy", "__array__"):
        _patch(tensor, name, _numpy)
    for name in HOST:
        _patch(tensor, name, functools.partial(_host, name))
    for owner, names in ((tensor, NEW), (torch, LIKE)):
        for name in names:
            _patch(owner, name, _like)
    for name in FACTORIES:
        _patch(torch, name, functools.partial(_factory, name))
    _patch(torch, "histc", _histc)
    tensor._make_wrapper_subclass = staticmethod(functools.partial(_shell, tensor._make_wrapper_subclass))
    install_groups()
    _patch(threading.Thread, "run", _in_thread)
    Devices().__enter__()
