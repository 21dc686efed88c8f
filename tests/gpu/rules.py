"""What the pretended GPU must say to code that would fail on a real one: run in a process of its own, prints JSON."""

import json

from tests.gpu.pretended import install, on_gpu, waits

install(gpus=1)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402


def raised(action) -> str:
    try:
        action()
    except Exception as error:
        return type(error).__name__
    return ""


def count(action) -> int:
    before = sum(waits.values())
    action()
    return sum(waits.values()) - before


class Planted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * torch.ones(2, device=x.device)

    @staticmethod
    def backward(ctx, grad):
        return grad + torch.zeros(2)


def main() -> None:
    there, here = torch.arange(4.0, device="cuda"), torch.arange(4.0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    gloo = dist.new_group(backend="gloo")
    weight = torch.ones(2, device="cuda", requires_grad=True)
    found = {
        "mixing": raised(lambda: there + here),
        "mixing in place": raised(lambda: there.add_(here)),
        "mixing in a backward pass": raised(lambda: Planted.apply(weight).sum().backward()),
        "a number of the host": raised(lambda: there + torch.tensor(1.0)),
        "an index of the host": raised(lambda: there[torch.tensor([0, 1])]),
        "a copy": raised(lambda: here.copy_(there)),
        "a CPU tensor in a collective": raised(lambda: dist.all_reduce(here)),
        "a GPU tensor in a collective": raised(lambda: dist.all_reduce(there)),
        "a CPU tensor in a gloo group": raised(lambda: dist.all_reduce(here, group=gloo)),
        "numpy": raised(lambda: there.numpy()),
        "a second device": raised(lambda: torch.cuda.set_device(1)),
        "places": [
            str(item.device) for item in (there, there[1:], there.to("cpu"), here.cuda(), there.new_zeros(2), here)
        ],
        "backward": on_gpu(torch.autograd.grad((weight * 2).sum(), weight)[0]),
        "waits": {
            "item": count(lambda: there[0].item()),
            "bool": count(lambda: bool(there[0])),
            "tolist": count(lambda: there.tolist()),
            "to the host": count(lambda: there.cpu()),
            "boolean index": count(lambda: there[there > 1]),
            "values to the device": count(lambda: torch.tensor([1, 2], device="cuda")),
            "arithmetic": count(lambda: (there * 2).softmax(0).to(torch.bfloat16)),
            "a number behind a mask": count(lambda: there.clone().__setitem__(there > 1, 0.0)),
            "the host's own": count(lambda: here.tolist()),
        },
    }
    print(json.dumps(found))


main()
