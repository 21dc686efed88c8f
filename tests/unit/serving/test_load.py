"""Many clients at a time, hostile ones among them: every honest one is answered, and nothing is left behind.

`make test-load` takes ten minutes and 64 clients (LOAD_SECONDS, LOAD_CLIENTS).
"""

import gc
import os
import statistics
import threading
import time

import psutil

from benchmarks import load
from megatron_moellava.inference.forward import REMEMBERED_IMAGES
from tests.helpers.serving import serving

SECONDS = float(os.environ.get("LOAD_SECONDS", "6"))
CLIENTS = int(os.environ.get("LOAD_CLIENTS", "16"))
# Megabytes that the last third of the time may add, by its slope: in seconds caches, pools and arenas are still filling.
GROWTH = 15 if SECONDS >= 600 else 100
SAMPLES = 60


class Memory(threading.Thread):
    """Megabytes of this process, clients and server, while the load runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.megabytes: list[float] = []
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(SECONDS / SAMPLES):
            gc.collect()
            self.megabytes.append(psutil.Process().memory_info().rss / 1e6)

    def growth(self) -> float:
        """Of the last third, by the line through it."""
        self.ended.set()
        last = self.megabytes[-len(self.megabytes) // 3 :]
        return statistics.linear_regression(range(len(last)), last).slope * len(last)


def test_every_honest_client_is_answered_and_memory_stays(caplog):
    options = {"prefix_cache": 0.002, "max_batch_size": 16}
    # Server and clients share one process and its lock: on a busy machine bodies and answers take long by nobody's fault.
    patience = {"body_seconds": 60.0, "request_seconds": 600.0}
    with serving(engine_options=options, max_open_requests=4 * CLIENTS, **patience) as server:
        memory = Memory()
        memory.start()
        tally = load.run(server.port, CLIENTS, SECONDS)
        growth = memory.growth()
        deadline = time.monotonic() + 60
        while server.service.open_requests or server.engine.busy:
            assert time.monotonic() < deadline, "a request was left behind"
            time.sleep(0.05)
        print(f"{CLIENTS} clients, {SECONDS:g} s: {len(tally.seconds)} answers,", dict(tally.done))
        print("memory (MB):", *(round(number) for number in memory.megabytes), f"last third: {growth:+.1f}")
        assert tally.errors == []
        assert set(tally.done) == {kind.__name__ for kind in load.KINDS}
        engine = server.engine
        assert len(engine.forward.features) <= REMEMBERED_IMAGES
        assert 0 < engine.prefixes.bytes <= engine.prefixes.limit and engine.cached_tokens > 0
        assert not server.service.failure
        assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
        assert growth < GROWTH
