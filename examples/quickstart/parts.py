"""Which parts of a quickstart are done: OUT/parts/NAME.json, by a digest of what a part was asked for.

A part's digest holds its settings and the digests of the parts that it needs, so that a changed part does anew whatever
comes of it, and nothing else. A part that was cut short begins anew, or goes on if it can (training and the tower's
pretraining keep checkpoints in their folder); one with other settings than what lies there begins with an empty folder.
All processes see the same markers: the first one writes, between barriers.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SOURCES = ("*.py", "*.yaml")  # of the quickstart itself: what has been changed there is another quickstart


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part: what it is asked for, what it uses, and what does it. `action` returns plain data."""

    name: str  # and that of its folder
    settings: object  # plain data that decides about its result
    action: Callable[[], dict | None]
    needs: Sequence[str] = ()  # parts before it whose results it uses
    goes_on: bool = False  # `action` continues from what it finds in its folder
    seconds: float = 0.0  # that it should take


@dataclass(slots=True)
class Parts:
    """The parts of one quickstart in the folder `out`."""

    out: Path
    barrier: Callable[[], None]
    leads: bool  # whether this process writes
    say: Callable[[str], None] = print
    digests: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # of each part, when it was done

    def left(self, parts: Sequence[Part]) -> list[Part]:
        """Those that are not done yet; `parts` in the order in which they need each other."""
        return [part for part in parts if not self._is_done(part, self._read(part.name))]

    def _is_done(self, part: Part, marker: dict) -> bool:
        """Also writes down the part's digest, for those that need it."""
        digest = digest_of(part.settings, [self.digests[other] for other in part.needs])
        self.digests[part.name] = digest
        return marker.get("digest") == digest and marker["done"] and (self.out / part.name).exists()

    def run(self, part: Part) -> dict:
        """What the part's action returns, now or when the part was done. The parts that it needs have run before."""
        name, known = part.name, self._read(part.name)
        done, digest = self._is_done(part, known), self.digests[part.name]
        self.barrier()  # every process has read before the first one writes
        if done:
            self.say(f"--- {name}: done before")
            self.seconds[name] = known["seconds"]
            return known["result"]
        if self.leads:
            if not (part.goes_on and known.get("digest") == digest):
                shutil.rmtree(self.out / name, ignore_errors=True)
            self._write(name, {"digest": digest, "done": False})
        self.barrier()
        started = time.perf_counter()
        result = part.action() or {}
        self.seconds[name] = round(time.perf_counter() - started, 1)
        self.barrier()
        if self.leads:
            self._write(name, {"digest": digest, "done": True, "seconds": self.seconds[name], "result": result})
        self.barrier()
        return result

    def forget(self) -> None:
        """Begin anew, whatever is there."""
        if self.leads:
            shutil.rmtree(self.out / "parts", ignore_errors=True)
        self.barrier()

    def _file(self, name: str) -> Path:
        return self.out / "parts" / f"{name}.json"

    def _read(self, name: str) -> dict:
        """The marker of a part; empty where there is none, or half of one."""
        try:
            return json.loads(self._file(name).read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def _write(self, name: str, marker: dict) -> None:
        from megatron_moellava.checkpoint.folders import write_durably

        self._file(name).parent.mkdir(parents=True, exist_ok=True)
        write_durably(self._file(name), json.dumps(marker).encode())


def digest_of(settings: object, needed: Sequence[str]) -> str:
    """Of plain data and of the parts that a part needs."""
    return hashlib.sha256(json.dumps([settings, list(needed)], sort_keys=True).encode()).hexdigest()


def digest_of_sources(folder: Path) -> str:
    """Of the quickstart's own files."""
    files = sorted(file for pattern in SOURCES for file in folder.glob(pattern))
    return digest_of([[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files], [])
