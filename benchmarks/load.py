"""Clients for a load on a server, honest and hostile ones, over the loopback device only.

Each client is a thread that draws what it does next. An honest request must be answered, a malformed one refused with the
status of its kind, and what slow and vanishing clients do must harm nobody; whatever else happens is an error of the tally.
"""

import base64
import http.client
import io
import json
import random
import socket
import struct
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import jsonschema
from PIL import Image, ImageDraw

PATH = "/v1/chat/completions"
PATIENCE = 900  # seconds that a client waits for the next byte: longer than a server may take for an answer
QUESTIONS = ("what is the color of the shape?", "what shape is in the image?", "is there a red circle?")
RUBBISH = (
    b"{",
    b"[" * 50_000,
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "n": 99}',
    b'{"messages": [{"role": "user", "content": "a"}], "top_logprobs": 3}',
)
SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square"]},
        "colours": {
            "type": "array",
            "items": {"type": "string", "pattern": "^[a-z]{1,8}$"},
            "minItems": 1,
            "maxItems": 2,
        },
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["shape", "colours", "count"],
    "additionalProperties": False,
}
WRONG_SCHEMAS = (
    {"type": "strin"},
    {"$ref": "#/nope"},
    {"type": "integer", "minimum": 3, "maximum": 1},
    {"type": "string", "pattern": "("},
    {"enum": [f"v{number}" for number in range(6000)]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},  # refused while it runs
)


class WrongAnswer(Exception):
    """What the server should not have said."""


@dataclass
class Tally:
    """What happened to all clients together."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    seconds: list[float] = field(default_factory=list)  # until the end of an answer
    first: list[float] = field(default_factory=list)  # until its beginning
    tokens: int = 0
    done: Counter = field(default_factory=Counter)  # by kind of client
    errors: list[str] = field(default_factory=list)


@dataclass
class Client:
    """One client's connection to the server's port, its dice, and where it counts."""

    port: int
    source: random.Random
    tally: Tally

    def post(self, body: bytes) -> http.client.HTTPResponse:
        """The response to a body, its head read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("POST", PATH, body, {"Content-Type": "application/json"})
        return connection.getresponse()

    def refused(self, body: bytes, *expected: int) -> None:
        """Send what must be refused."""
        with self.post(body) as response:
            answer = response.read()
            if response.status not in expected or b'"message"' not in answer:
                raise WrongAnswer(f"{response.status}: {answer[:200]!r}")

    def whole(self, **fields) -> dict:
        """The answer to a question, counted."""
        started = time.monotonic()
        with self.post(json.dumps(self.question(**fields)).encode()) as response:
            start = response.read(1)
            first = time.monotonic() - started
            answer = start + response.read()
        if response.status != 200:
            raise WrongAnswer(f"{response.status}: {answer[:200]!r}")
        found = json.loads(answer) if not fields.get("stream") else _joined(answer.decode())
        with self.tally.lock:
            self.tally.seconds.append(time.monotonic() - started)
            self.tally.first.append(first)
            self.tally.tokens += found["usage"]["completion_tokens"]
        return found

    def question(self, **fields) -> dict:
        """A body about a picture."""
        picture = {"type": "image_url", "image_url": {"url": data_url(self.source)}}
        text = {"type": "text", "text": self.source.choice(QUESTIONS)}
        return {
            "messages": [{"role": "user", "content": [picture, text]}],
            "max_tokens": self.source.randrange(4, 48),
            "temperature": 1.5,  # longer answers than the likeliest one
        } | fields


def data_url(source: random.Random) -> str:
    """One of a few hundred pictures."""
    image = Image.new("RGB", (64, 64), (240, 240, 255))
    x, y = source.randrange(8, 40), source.randrange(8, 40)
    ImageDraw.Draw(image).ellipse((x, y, x + 16, y + 16), fill=(source.randrange(256), 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _joined(events: str) -> dict:
    """A stream as one answer: its usage, and the text of each choice."""
    if not events.endswith("data: [DONE]\n\n"):
        raise WrongAnswer(f"a stream that ends with {events[-200:]!r}")
    chunks = [json.loads(line[6:]) for line in events.split("\n\n")[:-2]]
    texts: defaultdict[int, str] = defaultdict(str)
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    return {"usage": chunks[-1]["usage"], "texts": dict(texts)}


def _check(holds: bool, what: object) -> None:
    if not holds:
        raise WrongAnswer(str(what)[:300])


# --- honest -----------------------------------------------------------------------------------------------------------


def whole(client: Client) -> None:
    """A question and its answer."""
    client.whole()


def stream(client: Client) -> None:
    """The same in pieces."""
    client.whole(stream=True, stream_options={"include_usage": True})


def several(client: Client) -> None:
    """Three answers with log-probabilities."""
    answer = client.whole(n=3, logprobs=True, top_logprobs=2)
    _check([choice["index"] for choice in answer["choices"]] == [0, 1, 2], answer)
    entries = [entry for choice in answer["choices"] for entry in choice["logprobs"]["content"]]
    _check(all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2 for entry in entries), answer)


def as_json(client: Client) -> None:
    """An answer that a schema describes, unless its length ends it."""
    schema = {"type": "json_schema", "json_schema": {"name": "shapes", "schema": SCHEMA}}
    (choice,) = client.whole(response_format=schema, max_tokens=120)["choices"]
    if choice["finish_reason"] == "stop":
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)


def conversation(client: Client) -> None:
    """Two turns about one picture."""
    messages = client.question()["messages"]
    first = client.whole(messages=messages)
    messages += [first["choices"][0]["message"], {"role": "user", "content": "Sure?"}]
    second = client.whole(messages=messages)
    _check(second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"], second)


# --- hostile ----------------------------------------------------------------------------------------------------------


def leaves(client: Client) -> None:
    """Goes away in the middle of a stream."""
    with client.post(json.dumps(client.question(stream=True, n=2, max_tokens=48)).encode()) as response:
        _check(response.status == 200, response.status)
        response.read(1)


def slow(client: Client) -> None:
    """Reads a stream byte by byte for a while, then goes away."""
    with client.post(json.dumps(client.question(stream=True, max_tokens=48)).encode()) as response:
        _check(response.status == 200, response.status)
        for _ in range(20):
            response.read(1)
            time.sleep(0.1)


def half(client: Client) -> None:
    """Sends a part of its body and is silent."""
    with socket.create_connection(("127.0.0.1", client.port), timeout=60) as connection:
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        )
        connection.sendall(head.encode() + b'{"messages": ')
        time.sleep(client.source.random())


def rubbish(client: Client) -> None:
    """Sends what is no request."""
    client.refused(client.source.choice(RUBBISH), 400)


def wrong_schema(client: Client) -> None:
    """Asks for JSON by a schema that means nothing, or too much."""
    schema = {"type": "json_schema", "json_schema": {"name": "wrong", "schema": client.source.choice(WRONG_SCHEMAS)}}
    client.refused(json.dumps(client.question(response_format=schema)).encode(), 400)


def huge(client: Client) -> None:
    """Sends a picture of 2.5 thousand million pixels in a few kilobytes."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"\0" * 2_000_000)
    parts = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, body))
    url = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    client.refused(json.dumps({"messages": [{"role": "user", "content": content}]}).encode(), 400)


KINDS: dict[Callable[[Client], None], int] = {  # and how often
    whole: 10,
    stream: 10,
    several: 4,
    as_json: 4,
    conversation: 4,
    leaves: 2,
    slow: 1,
    half: 1,
    rubbish: 2,
    wrong_schema: 2,
    huge: 1,
}


def _client(port: int, number: int, until: float, tally: Tally) -> None:
    """Begins with a kind of its own, so that a few clients are of all kinds; then the dice decide."""
    client, kinds = Client(port, random.Random(number), tally), list(KINDS)
    kind: Callable[[Client], None] | None = kinds[number % len(kinds)]
    while kind is not None:
        try:
            kind(client)
        except (WrongAnswer, OSError, http.client.HTTPException, ValueError, jsonschema.ValidationError) as error:
            with tally.lock:
                tally.errors.append(f"{kind.__name__}: {type(error).__name__}: {error}")
        with tally.lock:
            tally.done[kind.__name__] += 1
        (kind,) = client.source.choices(kinds, list(KINDS.values())) if time.monotonic() < until else (None,)


def run(port: int, clients: int, seconds: float) -> Tally:
    """The tally of so many clients at a time, for so long."""
    tally, until = Tally(), time.monotonic() + seconds
    threads = [threading.Thread(target=_client, args=(port, number, until, tally)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally
