"""Many clients at a time, hostile ones among them: every honest one is answered, and nothing is left behind.

`make test-load` takes ten minutes and 64 clients (LOAD_SECONDS, LOAD_CLIENTS).
"""

import gc
import os
import threading
import time

import psutil

from benchmarks import load
from megatron_moellava.inference.forward import REMEMBERED_IMAGES
from tests.helpers.serving import serving

SECONDS = float(os.environ.get("LOAD_SECONDS", "6"))
CLIENTS = int(os.environ.get("LOAD_CLIENTS", "16"))
# Megabytes that memory may grow over the second half of the time: in seconds caches, pools and arenas are still filling.
GROWTH = 25 if SECONDS >= 120 else 100


def resident() -> float:
    """Megabytes of this process, clients and server."""
    gc.collect()
    return psutil.Process().memory_info().rss / 1e6


def test_every_honest_client_is_answered_and_memory_stays(caplog):
    options = {"prefix_cache": 0.002, "max_batch_size": 16}
    with serving(engine_options=options, max_open_requests=4 * CLIENTS, body_seconds=5.0) as server:
        megabytes, tallies = [], []
        for _ in range(4):
            tallies.append(load.run(server.port, CLIENTS, SECONDS / 4))
            megabytes.append(resident())
        deadline = time.monotonic() + 60
        while server.service.open_requests or server.engine.busy:
            assert time.monotonic() < deadline, "a request was left behind"
            time.sleep(0.05)
        done = sum((tally.done for tally in tallies), load.Counter())
        print(f"{CLIENTS} clients, {SECONDS:g} s: {sum(len(t.seconds) for t in tallies)} answers,", dict(done))
        print("memory by quarters:", [round(number) for number in megabytes], "threads:", threading.active_count())
        assert [error for tally in tallies for error in tally.errors] == []
        assert set(done) == {kind.__name__ for kind in load.KINDS}
        engine = server.engine
        assert len(engine.forward.features) <= REMEMBERED_IMAGES
        assert 0 < engine.prefixes.bytes <= engine.prefixes.limit and engine.cached_tokens > 0
        assert not server.service.failure
        assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
        assert megabytes[3] < megabytes[1] + GROWTH
