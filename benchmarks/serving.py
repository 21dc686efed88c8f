"""Load on a server of its own: many clients for a while, over the loopback device only.

  python -m benchmarks.serving [--load runs/quickstart/stage3] [--clients 32] [--seconds 120] [--batch-size 16]

What the clients do, honest and hostile ones, is in load.py. Prints answers, tokens per second, the time to the first token
and to the last, and the server's memory by quarters of the time. Exit code 1 when an honest request fails, rubbish is not
refused, or memory grows by more than 2 % from the second quarter to the last.
"""

import argparse
import http.client
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.load import Tally, run

TOOL = Path(__file__).parents[1] / "tools" / "serve.py"


def resident_megabytes(process: subprocess.Popen) -> float:
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Memory(threading.Thread):
    """Samples the server's resident memory until `done`."""

    def __init__(self, process: subprocess.Popen):
        super().__init__()
        self.process, self.done, self.samples = process, threading.Event(), []

    def run(self) -> None:
        while not self.done.wait(0.25):
            self.samples.append(resident_megabytes(self.process))


def start_server(args: argparse.Namespace) -> tuple[subprocess.Popen, int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, str(TOOL), "--load", args.load, "--port", str(port)]
    command += ["--batch-size", str(args.batch_size), "--max-open-requests", str(2 * args.clients)]
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return process, port
        except OSError:
            time.sleep(0.3)
    raise SystemExit("the server did not start")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", default="runs/quickstart/stage3")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    process, port = start_server(args)
    try:
        run(port, args.clients, args.seconds / 4)  # caches, threads and pools fill
        memory = Memory(process)
        memory.start()
        tally = run(port, args.clients, args.seconds)
        memory.done.set()
        memory.join()
    finally:
        process.terminate()
        process.wait(30)
    return report(args, tally, memory.samples)


def report(args: argparse.Namespace, tally: Tally, memory: list[float]) -> int:
    print(
        f"{args.clients} clients, {args.seconds:g} s: {len(tally.seconds)} answers, {len(tally.errors)} errors\n"
        + ", ".join(f"{kind} {count}" for kind, count in tally.done.most_common())
    )
    if tally.seconds:
        print(
            f"{tally.tokens / args.seconds:.1f} tokens/s; first token median {statistics.median(tally.first):.2f} s; "
            f"answer median {statistics.median(tally.seconds):.2f} s, worst {max(tally.seconds):.2f} s"
        )
    quarter = len(memory) // 4
    means = [statistics.mean(memory[i * quarter : (i + 1) * quarter]) for i in range(4)]
    print("memory by quarters: " + ", ".join(f"{mean:.0f} MB" for mean in means))
    for error in tally.errors[:5]:
        print(f"error: {error}")
    return int(bool(tally.errors) or not tally.seconds or means[3] > 1.02 * means[1])


if __name__ == "__main__":
    sys.exit(main())
