"""What a bound on oneDNN's compiled kernels costs a server: requests of ever other lengths, with several bounds.

  python -m benchmarks.compiled_kernels [--rounds 20] [--requests 24] [--batch 16]

The bound is read when a process computes its first product, so each way is a process of its own; 1,024 is that of oneDNN
and torch by themselves. All have the same model and get the same requests, one process after the other in each round; prompts
have 8 to 300 words and a picture, answers 4 to 48 tokens, and no two rounds are alike. Seconds are those of the processor, on
one thread. Other work on the machine still moves them by more than a bound does; so the kernels that each way compiles are
counted (oneDNN says so), and what one costs is measured apart.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch

from benchmarks.generation import VOCABULARY, Job, ask_engine, open_engine
from benchmarks.measure import finish, median, say
from benchmarks.reference import Sizes, write_reference
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.inference.engine import Engine
from megatron_moellava.inference.packed_linear import KERNELS, PackedLinear, can_pack
from megatron_moellava.inference.prompts import Prompt

LIBRARY = 1024
WAYS = (128, 256, 512, LIBRARY)  # kernels that are kept
SIZES = Sizes(hidden=128, layers=4, ffn=352)  # the smaller a model, the larger the share of a compilation
WARM_UP = 2  # rounds


def varied_jobs(engine: Engine, number: int, requests: int) -> list[Job]:
    """The requests of a round: the same for all ways."""
    source, tower = random.Random(number), engine.model.tower
    jobs = []
    for index in range(requests):
        words = [source.randrange(3, VOCABULARY - 1) for _ in range(source.randrange(8, 300))]
        generator = torch.Generator().manual_seed(1000 * number + index)
        pixels = torch.randn(1, 3, tower.image_size, tower.image_size, generator=generator)
        tokens = words[:4] + [IMAGE_TOKEN] * tower.num_features + words[4:]
        jobs.append(Job(Prompt(tokens=tokens, pixels_NCHW=pixels, tiles=(1,)), source.randrange(4, 49)))
    return jobs


def answer_rounds(pipe: Connection, kept: int, folder: Path, args: argparse.Namespace) -> None:
    """The process of one way: (answers, seconds, kernels compiled, megabytes) of each round whose number it is told."""
    torch.set_num_threads(1)
    os.environ |= dict.fromkeys(KERNELS, str(kept)) | {"ONEDNN_VERBOSE": "profile_create"}
    told, seen = folder / "onednn.log", 0
    with told.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())  # where oneDNN says so
    engine = open_engine(folder, args.batch, "fp32")
    while (number := pipe.recv()) is not None:
        jobs = varied_jobs(engine, number, args.requests)
        started = time.process_time()
        said = ask_engine(engine, jobs)
        seconds = time.process_time() - started
        compiled = told.read_text().count("create:cache_miss")
        pipe.send((said, seconds, compiled - seen, psutil.Process().memory_info().rss / 1e6))
        seen = compiled


def compile_seconds() -> float:
    """What a number of rows costs the first time beyond the second, with one weight; in a process whose caches are new."""
    torch.set_num_threads(1)
    linear, weight_OI = PackedLinear(can_pack(torch.float32)), torch.ones(3 * SIZES.hidden, SIZES.hidden)
    spent = []
    with torch.no_grad():
        linear(torch.ones(1, SIZES.hidden), weight_OI)
        for rows in range(2, 66):
            times = [time.process_time()]
            for _ in range(2):
                linear(torch.ones(rows, SIZES.hidden), weight_OI)
                times.append(time.process_time())
            spent.append(2 * times[1] - times[0] - times[2])
    return median(spent)


def measure(args: argparse.Namespace) -> dict:
    context, pipes, processes = multiprocessing.get_context("fork"), {}, []
    seconds: dict[int, list[float]] = {kept: [] for kept in WAYS}
    compiled: dict[int, list[int]] = {kept: [] for kept in WAYS}
    megabytes: dict[int, float] = {}
    tokens = []
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "source"
        write_reference(source, SIZES)
        for kept in WAYS:
            folder = Path(shutil.copytree(source, Path(place) / str(kept)))
            pipes[kept], theirs = context.Pipe()
            processes.append(context.Process(target=answer_rounds, args=(theirs, kept, folder, args), daemon=True))
            processes[-1].start()
        for number in range(args.rounds + WARM_UP):
            said = {}
            turn = number % len(WAYS)
            for kept in WAYS[turn:] + WAYS[:turn]:
                pipes[kept].send(number)
                said[kept], took, count, megabytes[kept] = pipes[kept].recv()
                seconds[kept] += [took] if number >= WARM_UP else []
                compiled[kept] += [count] if number >= WARM_UP else []
            assert all(answers == said[LIBRARY] for answers in said.values())
            tokens += [sum(map(len, said[LIBRARY]))] if number >= WARM_UP else []
            latest = {kept: (*seconds[kept][-1:], *compiled[kept][-1:]) for kept in WAYS}
            say(f"round {number}: {latest}")
        for process, pipe in zip(processes, pipes.values(), strict=True):
            pipe.send(None)
            process.join()
    with context.Pool(1) as pool:
        cost = pool.apply(compile_seconds)
    sizes = {"hidden": SIZES.hidden, "layers": SIZES.layers, "experts": SIZES.experts}
    found = {"kept": int(KERNELS["LRU_CACHE_CAPACITY"]), **sizes, "compile seconds": cost, "ways": {}}
    for kept, values in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(values, seconds[LIBRARY], strict=True)]
        found["ways"][kept] = {
            "tokens per second": median([count / value for count, value in zip(tokens, values, strict=True)]),
            "compiled": median(compiled[kept]),
            "share": cost * (median(compiled[kept]) - median(compiled[LIBRARY])) / median(seconds[LIBRARY]),
            "over library": median(ratios),
            "quartiles": statistics.quantiles(ratios, n=4)[::2],
            "megabytes": megabytes[kept],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=24, help="of a round")
    parser.add_argument("--batch", type=int, default=16, help="requests at the same time")
    args = parser.parse_args()
    finish({"requests": args.requests, "rounds": args.rounds, "batch": args.batch, **measure(args)})


if __name__ == "__main__":
    main()
