"""The HTTP side: OpenAI's /v1/chat/completions, the page, /health and /metrics.

Whatever a stranger sends costs little before it is refused, and nothing that happens to one request reaches another:
bodies are read with a limit of bytes and seconds, pictures are decoded in a few threads beside the event loop, and the
number of open requests is bounded.
"""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from megatron_moellava.config import DataConfig, DataError
from megatron_moellava.data.tokenizer import Tokenizer
from megatron_moellava.inference.prompts import Prompt
from megatron_moellava.inference.regions import locate_answer
from megatron_moellava.inference.requests import Completion, Event
from megatron_moellava.serving import openai_answers
from megatron_moellava.serving.metrics import ServerMetrics
from megatron_moellava.serving.openai_api import ApiLimits, ChatRequest, parse_chat
from megatron_moellava.serving.pictures import PictureLimits, endings, open_url, png_url
from megatron_moellava.serving.service import EngineFailed, Service
from megatron_moellava.towers import Tower
from megatron_moellava.towers.branches import tower_for

logger = logging.getLogger(__name__)
DISCARDED = (
    64_000_000  # bytes read of a body that is too large: a client that is still sending would not see the answer
)
PAGE = Path(__file__).parent / "web" / "index.html"
PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src data: blob:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """Names, limits and access of a server."""

    model_name: str
    token: str = ""  # bearer token of /v1; empty: none is asked for
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")  # accepted Host headers; ("*",): any
    max_body_bytes: int = 30_000_000
    body_seconds: float = 20.0  # a body must be complete by then
    max_open_requests: int = 64  # running and waiting
    request_seconds: float = 300.0  # an answer must be complete by then
    reading_seconds: float = 60.0  # and the client must have read it so much later
    preparing_threads: int = 2  # pictures decoded at the same time
    examples: tuple[Path, ...] = ()  # pictures that the page offers
    api: ApiLimits = field(default_factory=ApiLimits)
    pictures: PictureLimits = field(default_factory=PictureLimits)


class Refused(Exception):
    """Answered with an error object of OpenAI's form."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status, self.kind = status, kind


def build_app(service: Service, options: ServerOptions) -> FastAPI:
    """The application with its routes; it starts the service and stops it at the end."""
    metrics = ServerMetrics(service)
    preparing = ThreadPoolExecutor(options.preparing_threads, thread_name_prefix="prepare")
    answering = Answering(service, options, metrics, preparing)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()
        preparing.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="megatron-moellava", docs_url=None, redoc_url=None, openapi_url=None, lifespan=life)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(options.hosts))

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        metrics.refused(error.status)
        return JSONResponse(error_object(str(error), error.kind), error.status, headers={"Connection": "close"})

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        authorise(request, options.token)
        return await answering.answer(request)

    @app.post("/shown")
    async def shown(request: Request) -> dict:
        authorise(request, options.token)
        return await answering.shown(request)

    @app.get("/v1/models")
    async def models(request: Request) -> dict:
        authorise(request, options.token)
        return {"object": "list", "data": [{"id": options.model_name, "object": "model", "owned_by": "local"}]}

    @app.get("/health")
    async def health() -> JSONResponse:
        if service.failure:
            return JSONResponse({"status": "failed", "reason": service.failure}, 503)
        return JSONResponse({"status": "ok", "model": options.model_name, "open_requests": service.open_requests})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    _add_page(app, service, options)
    return app


def _add_page(app: FastAPI, service: Service, options: ServerOptions) -> None:
    examples = {path.name: path for path in options.examples}
    tower, data = service.engine.model.tower, service.engine.prompter.data

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY, "X-Frame-Options": "DENY"})

    @app.get("/page.json")
    async def page_settings() -> dict:
        return {
            "model": options.model_name,
            "needs_token": bool(options.token),
            "max_tokens": options.api.max_new_tokens,
            "max_images": options.api.max_images,
            "max_bytes": options.pictures.max_bytes,
            "examples": list(examples),
            # How the page lays patches over a picture: as the tower sees it.
            # (At native resolution each answer brings the grids of its pictures.)
            **seen_by(tower, data),
            "tiles": data.image_grid,
            "modalities": [
                {"name": item.name, "accept": endings(item), **seen_by(tower_for(item, tower), data)}
                for item in data.modalities
            ],
        }

    @app.get("/examples/{name}")
    async def example(name: str) -> FileResponse:
        if name not in examples:
            raise Refused(404, "no such example")
        return FileResponse(examples[name])


def seen_by(tower: Tower, data: DataConfig) -> dict:
    """The grid of a tower's visual tokens, how many patches it leaves out before the first, and what it makes of a picture."""
    squashes = tower.native or (tower.resize, data.image_aspect_ratio) == ("square", "square")
    return {
        "grid": tower.position_side // tower.shuffle,
        "first_patch": int(tower.drop_first_feature and not tower.class_token),
        "square": "squash" if squashes else data.image_aspect_ratio,
    }


def authorise(request: Request, token: str) -> None:
    """Raise Refused (401) unless the request carries the bearer token; an empty `token` lets everybody in."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    if token and not hmac.compare_digest(given, token.encode()):
        raise Refused(401, "the bearer token is missing or wrong", "authentication_error")


def error_object(message: str, kind: str) -> dict:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


@dataclass(slots=True)
class Answering:
    """One chat completion from its body to its last byte."""

    service: Service
    options: ServerOptions
    metrics: ServerMetrics
    preparing: ThreadPoolExecutor
    open: int = 0

    async def answer(self, request: Request) -> Response:
        """A slot is taken before the body is read, and given back when the answer is sent or the client has gone.

        Raises Refused (429) when none is free.
        """
        self._take()
        handed_over = False
        try:
            chat, prompt = await self._prepare(await self._body(request))
            deadline = time.monotonic() + self.options.request_seconds
            if chat.stream:
                handed_over = True
                events = self._stream(chat, prompt, deadline)
                return EventStream(events, self._close, self.options.request_seconds + self.options.reading_seconds)
            return JSONResponse(await self._whole(request, chat, prompt, deadline))
        finally:
            if not handed_over:
                self._close()

    def _take(self) -> None:
        if self.open >= self.options.max_open_requests:
            raise Refused(429, f"{self.open} requests are open already; try again later", "rate_limit_error")
        self.open += 1

    def _close(self) -> None:
        self.open -= 1

    async def shown(self, request: Request) -> dict:
        """For the page: {"url"} of a picture of a modality as the model sees its levels, of {"modality", "url"} with the file.

        Raises Refused with what is wrong with the file.
        """
        self._take()
        try:
            data, modalities = await self._body(request), self.service.engine.prompter.data.modalities

            def work() -> dict:
                try:
                    body = json.loads(data)
                except (ValueError, RecursionError) as error:
                    raise Refused(400, f"the body is not valid JSON ({type(error).__name__})") from None
                asked = body.get("modality") if isinstance(body, dict) else None
                modality = next((item for item in modalities if item.name == asked), None)
                if modality is None or not isinstance(body.get("url"), str):
                    raise Refused(400, "the body must be {modality, url} of a modality that the checkpoint has")
                try:
                    return {"url": png_url(open_url(body["url"], self.options.pictures, modality))}
                except DataError as error:
                    raise Refused(400, str(error)) from None

            return await asyncio.get_running_loop().run_in_executor(self.preparing, work)
        finally:
            self._close()

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # also what keeps other web sites' forms out
            raise Refused(415, "Content-Type must be application/json")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refused(415, "compressed bodies are not accepted")
        limit, size, data = self.options.max_body_bytes, 0, bytearray()
        try:
            async with asyncio.timeout(self.options.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size <= limit:
                        data += part
                    elif size > max(limit, DISCARDED):
                        break
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {self.options.body_seconds:g} s") from None
        except ClientDisconnect:
            raise Refused(499, "the client has gone") from None
        if size > limit:
            raise Refused(413, f"the body has more than {limit:,} bytes")
        return bytes(data)

    async def _prepare(self, data: bytes) -> tuple[ChatRequest, Prompt]:
        prompter = self.service.engine.prompter

        def work() -> tuple[ChatRequest, Prompt]:
            try:
                chat = parse_chat(json.loads(data), self.options.api, self.options.pictures, prompter.data)
                request, prompt = self.service.engine.fit(chat.request)
                return replace(chat, request=request), prompt
            except (ValueError, RecursionError) as error:
                raise Refused(400, f"the body is not valid JSON ({type(error).__name__})") from None
            except DataError as error:
                raise Refused(400, str(error)) from None

        return await asyncio.get_running_loop().run_in_executor(self.preparing, work)

    async def _whole(self, request: Request, chat: ChatRequest, prompt: Prompt, deadline: float) -> dict:
        completions: list[Completion] = []
        async with aclosing(self._events(chat, prompt, deadline)) as events:
            async for event in events:
                completions += [event.completion] if event.completion is not None else []
                if await request.is_disconnected():
                    break
        if len(completions) < chat.request.sampling.n:
            raise Refused(499, "the client has gone")
        _check_complete(completions)
        wanted = chat.request.sampling.logprobs is not None
        return openai_answers.completion_object(
            completions, self.options.model_name, self._tokenizer, wanted, self._places(chat)
        )

    def _places(self, chat: ChatRequest) -> Callable[[Completion], list[dict]] | None:
        """What finds the places that an answer names, if they were asked for."""
        if not chat.regions:
            return None
        prompter, images = self.service.engine.prompter, chat.request.images
        return lambda completion: [place.data() for place in locate_answer(completion.text, images, prompter)]

    async def _stream(self, chat: ChatRequest, prompt: Prompt, deadline: float) -> AsyncGenerator[str]:
        name = self.options.model_name
        completions: list[Completion] = []
        try:
            for index in range(chat.request.sampling.n):
                yield _line(openai_answers.first_chunk(chat.request.id, name, index))
            async with aclosing(self._events(chat, prompt, deadline)) as events:
                async for event in events:
                    if event.delta or event.logprobs:
                        yield _line(openai_answers.delta_chunk(event, name, self._tokenizer))
                    if event.completion is not None:
                        completions.append(event.completion)
                        _check_complete(completions)
                        yield _line(openai_answers.last_chunk(event.completion, name, self._places(chat)))
            if chat.include_usage:
                yield _line(openai_answers.usage_chunk(completions, name))
            yield "data: [DONE]\n\n"
        except Refused as error:
            yield _line(error_object(str(error), error.kind))

    async def _events(self, chat: ChatRequest, prompt: Prompt, deadline: float) -> AsyncGenerator[Event]:
        """The engine's events, timed. Raises Refused when it fails or takes too long."""
        started, first = time.monotonic(), None
        completions: list[Completion] = []
        events = self.service.events(chat.request, prompt)
        try:
            while len(completions) < chat.request.sampling.n:
                async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                    event: Event = await anext(events)
                first = first or time.monotonic()
                completions += [event.completion] if event.completion is not None else []
                yield event
        except TimeoutError:
            raise Refused(
                504, f"no complete answer within {self.options.request_seconds:g} s", "timeout_error"
            ) from None
        except EngineFailed as error:
            raise Refused(503, f"the engine has failed: {error}", "server_error") from None
        finally:
            await events.aclose()
            self._count(chat, completions, started, first)

    def _count(self, chat: ChatRequest, completions: list[Completion], started: float, first: float | None) -> None:
        now = time.monotonic()
        if len(completions) == chat.request.sampling.n and not any(item.failure for item in completions):
            self.metrics.answered(chat.request, completions, now - started, (first or now) - started)

    @property
    def _tokenizer(self) -> Tokenizer:
        return self.service.engine.prompter.tokenizer


def _check_complete(completions: list[Completion]) -> None:
    """Raise Refused when one of the answers has failed by itself, as a schema too complex for its grammar makes it."""
    for failure in {item.failure for item in completions} - {""}:
        raise Refused(400, f"the JSON answer cannot be continued: {failure}")


class EventStream(StreamingResponse):
    """Server-sent events. `done` is called once, also when the client has gone before the first of them.

    A client that does not read stops the events, and with them every limit of time that they have: so the whole has one.
    """

    def __init__(self, events: AsyncGenerator[str], done: Callable[[], None], seconds: float):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.events, self.done, self.seconds = events, done, seconds

    async def __call__(self, scope, receive, send) -> None:
        try:
            async with asyncio.timeout(self.seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            logger.warning("a client has not read its answer within %g s; its connection is closed", self.seconds)
        finally:
            await self.events.aclose()
            self.done()


def _line(item: dict) -> str:
    return f"data: {json.dumps(item, ensure_ascii=False)}\n\n"
