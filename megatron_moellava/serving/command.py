"""What moellava chat and moellava serve call."""

import argparse
import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_moellava import parallel
from megatron_moellava.config import CheckpointError, ConfigError
from megatron_moellava.inference.engine import Engine
from megatron_moellava.inference.load import engine_of
from megatron_moellava.inference.prompts import Prompter
from megatron_moellava.inference.requests import Event, Request, Sampling
from megatron_moellava.serving.chat import Conversation, run_chat
from megatron_moellava.serving.service import Service

EXAMPLE_TYPES = (".png", ".jpg", ".jpeg", ".webp")


def open_engine(args: argparse.Namespace, **options) -> Engine:
    """The engine over `--load`, under the layout of the arguments; `options` go to `Engine`.

    Raises CheckpointError where there is no checkpoint, and ConfigError for options that do not fit it.
    """
    if not Path(args.load).exists():
        raise CheckpointError(
            f"--load={args.load} does not exist; name a checkpoint folder, or run `make quickstart`, which writes "
            "runs/quickstart/stage3"
        )
    return engine_of(args, replicated=True, **options)


def chat(args: argparse.Namespace) -> None:
    """What `moellava chat` does: the first rank talks, the others follow."""
    engine = open_engine(args, max_batch_size=max(args.num_beams, 1))
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        num_beams=args.num_beams,
    )
    try:
        if dist.get_rank() == 0:
            run_chat(Conversation(MultiRankEngine(engine), sampling), args.image)
            MultiRankEngine(engine).stop()
        else:
            Service(engine).follow()
    finally:
        parallel.shutdown()


class MultiRankEngine:
    """The first rank's engine in a terminal: what it is asked, the other ranks are told."""

    def __init__(self, engine: Engine):
        self.engine = engine

    @property
    def prompter(self) -> Prompter:
        """How it makes prompts; pictures are read as it does."""
        return self.engine.prompter

    def stream(self, request: Request):
        """The events of one request, on all ranks."""
        request, prompt = self.engine.fit(request)
        yield from self._told([("submit", replace(request, images=()), prompt)])
        while self.engine.busy:
            yield from self._told([])

    def cancel(self, request_id: str) -> None:
        """End a request on all ranks."""
        self._told([("cancel", request_id)])

    def stop(self) -> None:
        """Let the other ranks end."""
        if dist.get_world_size() > 1:
            dist.broadcast_object_list([[("stop",)]], src=0)

    def _told(self, commands: list[tuple]) -> list[Event]:
        if dist.get_world_size() > 1:
            dist.broadcast_object_list([commands], src=0)
        for kind, *arguments in commands:
            (self.engine.submit if kind == "submit" else self.engine.cancel)(*arguments)
        return self.engine.step() if self.engine.busy else []


def serve(args: argparse.Namespace) -> None:
    """What `moellava serve` does: the first rank listens, the others follow. ConfigError without the `demo` extra."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"serving needs {', '.join(missing)}: pip install 'megatron-moellava[demo]'")
    engine = open_engine(args, max_batch_size=args.batch_size, prefix_cache=args.prefix_cache)
    service = Service(engine)
    try:
        if dist.get_rank() == 0:
            _listen(service, args)
        else:
            service.follow()
    finally:
        parallel.shutdown()


def _listen(service: Service, args: argparse.Namespace) -> None:
    import uvicorn

    from megatron_moellava.serving.openai_api import ApiLimits
    from megatron_moellava.serving.pictures import PictureLimits
    from megatron_moellava.serving.server import ServerOptions, build_app

    is_local = args.host in ("127.0.0.1", "localhost", "::1")
    hosts = ("localhost", "127.0.0.1", "[::1]", *args.allow_host) if is_local else tuple(args.allow_host) or ("*",)
    options = ServerOptions(
        model_name=args.model_name or Path(args.load).resolve().name,
        token=os.environ.get(args.token_variable, ""),
        hosts=hosts,
        max_body_bytes=int(args.max_body_mb * 1e6),
        max_open_requests=args.max_open_requests,
        request_seconds=args.request_seconds,
        examples=_examples(args.examples),
        api=ApiLimits(
            max_new_tokens=args.max_new_tokens,
            default_new_tokens=min(ApiLimits().default_new_tokens, args.max_new_tokens),
        ),
        pictures=PictureLimits(allow_remote=args.allow_remote_images),
    )
    if not is_local and not options.token:
        print(f"warning: {args.host} is open to others and {args.token_variable} is not set", flush=True)
    print(f"{options.model_name} on http://{args.host}:{args.port} (API: /v1, Prometheus: /metrics)", flush=True)
    uvicorn.run(
        build_app(service, options),
        host=args.host,
        port=args.port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=5,
        server_header=False,
    )


def _examples(folder: str) -> tuple[Path, ...]:
    if not folder:
        return ()
    if not Path(folder).is_dir():
        raise ConfigError(f"--examples={folder} is not a folder; give one with pictures")
    return tuple(sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in EXAMPLE_TYPES))[:12]
