"""The engine in a thread of its own, for many callers at a time; under torchrun the other ranks follow.

Callers talk asyncio, the engine is plain Python: commands go in through a queue, events come out through the caller's
loop. A caller that reads slowly, or goes away, holds nobody up.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

import torch.distributed as dist

from megatron_moellava.inference.engine import Engine
from megatron_moellava.inference.prompts import Prompt
from megatron_moellava.inference.requests import Event, Request

logger = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 20.0  # idle ranks wait in a collective, whose timeout is minutes
STOP = ("stop",)


class EngineFailed(Exception):
    """The engine's thread is gone; the process should be started again."""


@dataclass(slots=True)
class _PendingCaller:
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue

    def tell(self, item: Event | None) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, item)


@dataclass(slots=True)
class Service:
    """The engine of this rank and its callers; `failure` says why the engine stopped, "" while it runs."""

    engine: Engine
    failure: str = ""
    _commands: queue.Queue = field(default_factory=queue.Queue)
    _callers: dict[str, _PendingCaller] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread = threading.Thread(target=self._lead, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the engine's thread; waits up to a minute for it."""
        self._commands.put(STOP)
        if self._thread is not None:
            self._thread.join(timeout=60)

    @property
    def open_requests(self) -> int:
        """Requests that somebody waits for."""
        return len(self._callers)

    async def events(self, request: Request, prompt: Prompt) -> AsyncGenerator[Event]:
        """The events of a prepared request, until all its answers have ended. Leaving early cancels it. Raises EngineFailed."""
        caller = _PendingCaller(asyncio.get_running_loop(), asyncio.Queue())
        with self._lock:
            if self.failure:
                raise EngineFailed(self.failure)
            self._callers[request.id] = caller
        self._commands.put(("submit", replace(request, images=()), prompt))
        running = request.sampling.n
        try:
            while running:
                event = await caller.events.get()
                if event is None:
                    raise EngineFailed(self.failure)
                running -= event.completion is not None
                yield event
        finally:
            self._callers.pop(request.id, None)
            if running:
                self._commands.put(("cancel", request.id))

    def follow(self) -> None:
        """What all other ranks do until the first one stops."""
        while True:
            box: list = [None]
            dist.broadcast_object_list(box, src=0)
            if not self._obey(box[0]):
                return

    def _lead(self) -> None:
        try:
            while True:
                commands = self._next_commands()
                if dist.get_world_size() > 1:
                    dist.broadcast_object_list([commands], src=0)
                if not self._obey(commands):
                    return
        except Exception as error:
            logger.exception("the engine has failed")
            with self._lock:
                self.failure = f"{type(error).__name__}: {error}"
                for caller in list(self._callers.values()):
                    caller.tell(None)

    def _next_commands(self) -> list[tuple]:
        commands = []
        try:
            if not self.engine.busy:
                commands.append(self._commands.get(timeout=HEARTBEAT_SECONDS))
            while True:
                commands.append(self._commands.get_nowait())
        except queue.Empty:
            return commands

    def _obey(self, commands: list[tuple]) -> bool:
        """Take the commands over, make one step, tell the callers. False: stop."""
        for kind, *arguments in commands:
            if kind == "stop":
                return False
            (self.engine.submit if kind == "submit" else self.engine.cancel)(*arguments)
        for event in self.engine.step() if self.engine.busy else ():
            caller = self._callers.get(event.request_id)
            if caller is not None:
                caller.tell(event)
        return True
