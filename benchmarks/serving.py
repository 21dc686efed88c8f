"""Load on a server of its own: many clients for a while, over the loopback device only.

  python -m benchmarks.serving [--load runs/quickstart/stage3] [--clients 32] [--seconds 120] [--batch-size 16]

Half of the clients stream, some leave in the middle, a few send rubbish. Prints answers, tokens per second, the time to
the first token and to the last, and the server's memory by quarters of the time. Exit code 1 when an honest request
fails, rubbish is not refused, or memory grows by more than 2 % from the second quarter to the last.
"""

import argparse
import base64
import http.client
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw

TOOL = Path(__file__).parents[1] / "tools" / "serve.py"
QUESTIONS = ("what is the color of the shape?", "what shape is in the image?", "is there a red circle?")
RUBBISH = (
    b"{",
    b"[" * 50_000,
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}',
)


@dataclass
class Tally:
    lock: threading.Lock = field(default_factory=threading.Lock)
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: int = 0
    left: int = 0
    refused: int = 0
    errors: list[str] = field(default_factory=list)


def data_url(source: random.Random) -> str:
    image = Image.new("RGB", (64, 64), (240, 240, 255))
    x, y = source.randrange(8, 40), source.randrange(8, 40)
    ImageDraw.Draw(image).ellipse((x, y, x + 16, y + 16), fill=(source.randrange(256), 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def client(port: int, number: int, until: float, tally: Tally) -> None:
    source = random.Random(number)
    while time.monotonic() < until:
        kind = source.random()
        try:
            if kind < 0.05:
                status = post(port, source.choice(RUBBISH)).status
                with tally.lock:
                    tally.refused += 1
                    if not 400 <= status < 500:
                        tally.errors.append(f"rubbish got {status}")
            else:
                honest(port, source, tally, stream=number % 2 == 0, leaves=kind < 0.1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            with tally.lock:
                tally.errors.append(f"{type(error).__name__}: {error}")


def post(port: int, body: bytes) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    return connection.getresponse()


def honest(port: int, source: random.Random, tally: Tally, stream: bool, leaves: bool) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(source)}},
        {"type": "text", "text": source.choice(QUESTIONS)},
    ]
    body = {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": source.randrange(4, 48),
        "temperature": 1.5,  # longer answers than the likeliest one
        "stream": stream or leaves,
        "stream_options": {"include_usage": True},
    }
    started = time.monotonic()
    response = post(port, json.dumps(body).encode())
    if response.status != 200:
        with tally.lock:
            tally.errors.append(f"{response.status}: {response.read(300)!r}")
        return
    response.read(1)
    first = time.monotonic() - started
    if leaves:
        response.close()
        with tally.lock:
            tally.left += 1
        return
    text = response.read().decode()
    usage = json.loads(text.split("data: ")[-2])["usage"] if stream else json.loads("{" + text)["usage"]
    with tally.lock:
        tally.seconds.append(time.monotonic() - started)
        tally.first.append(first)
        tally.tokens += usage["completion_tokens"]


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


def run(port: int, clients: int, seconds: float) -> Tally:
    tally, until = Tally(), time.monotonic() + seconds
    threads = [threading.Thread(target=client, args=(port, number, until, tally)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


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
        f"{args.clients} clients, {args.seconds:g} s: {len(tally.seconds)} answers, {tally.left} left in the middle, "
        f"{tally.refused} times rubbish, {len(tally.errors)} errors"
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
