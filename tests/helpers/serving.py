"""A server over a tiny random model on a loopback port, in threads of this process."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moellava import parallel
from megatron_moellava.config import MoEConfig
from megatron_moellava.inference.engine import Engine
from megatron_moellava.inference.load import load_for_inference
from megatron_moellava.serving.openai_api import ApiLimits
from megatron_moellava.serving.pictures import PictureLimits
from megatron_moellava.serving.service import Service
from tests.helpers.inference_models import tiny_engine


@dataclass
class Running:
    url: str
    port: int
    engine: Engine
    service: Service


@contextlib.contextmanager
def serving(checkpoint: str | None = None, engine_options: dict | None = None, **changes) -> Iterator[Running]:
    """`checkpoint`: serve this one instead; `changes`: of the server's options."""
    import uvicorn  # with fastapi, behind the server, a second that collecting the tests does not need

    from megatron_moellava.serving.server import ServerOptions, build_app

    engine_options = {"max_batch_size": 4} | (engine_options or {})
    if checkpoint:
        engine = load_for_inference(checkpoint, **engine_options)
    else:
        engine = tiny_engine(MoEConfig(), **engine_options)
    service = Service(engine)
    options = {
        "model_name": "tiny",
        "max_body_bytes": 4_000_000,
        "body_seconds": 2.0,
        "max_open_requests": 12,
        "request_seconds": 120.0,
        "api": ApiLimits(max_new_tokens=1000, default_new_tokens=12, max_characters=20_000),
        "pictures": PictureLimits(max_bytes=2_000_000, max_pixels=4_000_000),
    }
    app = build_app(service, ServerOptions(**options | changes))
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_level="error", log_config=None, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(url=f"http://127.0.0.1:{port}", port=port, engine=engine, service=service)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        parallel.shutdown()
