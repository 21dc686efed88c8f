"""The server with OpenAI's own client, and with what hostile clients send: that gets a 4xx, and nothing else suffers."""

import asyncio
import base64
import contextlib
import io
import json
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
import zlib

import pytest
from PIL import Image

from megatron_moellava.data.quantities import open_picture
from megatron_moellava.data.sample import Turn
from megatron_moellava.inference.requests import Request, Sampling
from tests.helpers.inference_models import picture
from tests.helpers.modalities import DEPTH, write_pictures
from tests.helpers.serving import serving


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def openai_client(server, key: str = "none"):
    import openai  # a second of imports that collecting the tests does not need

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def client(server):
    return openai_client(server)


def data_url(number: int = 3) -> str:
    buffer = io.BytesIO()
    picture(number).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def question(text: str = "What is it?", *urls: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls] + [{"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def post(server, data: bytes, path: str = "/v1/chat/completions", **headers) -> tuple[int, dict]:
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"{server.url}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def get(server, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(server.url + path, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def assert_serves(server) -> None:
    """Answers, and holds nothing back of what came before."""
    status, answer = post(server, json.dumps({"messages": question("hi"), "max_tokens": 2}).encode())
    assert (status, answer["object"]) == (200, "chat.completion")
    deadline = time.monotonic() + 30
    while server.service.open_requests or server.engine.busy:
        assert time.monotonic() < deadline, "a request was left behind"
        time.sleep(0.05)


def test_places_come_whole_and_streamed_where_they_are_asked_for(client):
    """What the tiny model says names none; test_openai_answers.py and the page's test show some."""
    arguments = {"model": "tiny", "messages": question("Where?", data_url()), "max_tokens": 3}
    assert "regions" not in client.chat.completions.create(**arguments).model_dump()["choices"][0]
    asked = arguments | {"extra_body": {"regions": True}}
    assert client.chat.completions.create(**asked).model_dump()["choices"][0]["regions"] == []
    *_, last = client.chat.completions.create(**asked, stream=True)
    assert last.model_dump()["choices"][0]["regions"] == []


def test_the_openai_client_gets_the_engines_answer_whole_and_streamed(server, client):
    arguments = {"model": "tiny", "messages": question("What is it?", data_url()), "max_tokens": 9}
    whole = client.chat.completions.create(**arguments)
    chunks = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content != ""
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    request = Request(
        id="x",
        turns=(Turn(role="user", text="<image>\nWhat is it?"),),
        images=(picture(3),),
        sampling=Sampling(max_new_tokens=9),
    )
    assert whole.usage.prompt_tokens == len(server.engine.prompter(request).tokens)


def test_a_conversation_with_pictures_and_routing(client):
    messages = [
        *question("First", data_url(1)),
        {"role": "assistant", "content": "red"},
        *question("Second", data_url(2)),
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3, extra_body={"routing": True})
    tokens = answer.routing["tokens"]
    assert {token["image"] for token in tokens if "image" in token} == {0, 1}
    assert all(len(layer["experts"]) == len(tokens) for layer in answer.routing["layers"])


def test_models_health_metrics_and_page(server, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert json.loads(get(server, "/health")[1])["status"] == "ok"
    assert_serves(server)
    assert b'moellava_requests_total{status="200"}' in get(server, "/metrics")[1]
    status, page = get(server, "/")
    assert status == 200
    for outside in (b"http://", b"https://", b"//cdn", b"@import", b'src="/'):
        assert outside not in page, "the page must not load anything from elsewhere"


def huge_png() -> str:
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"\0" * 20_000_000)
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, body))
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


HOSTILE = {
    "malformed JSON": (b'{"messages": [', 400),
    "not UTF-8": (b'{"messages": "\xff\xfe"}', 400),
    "deep JSON": (b"[" * 100_000 + b"]" * 100_000, 400),
    "not an object": (b"[1, 2]", 400),
    "empty": (b"", 400),
    "long prompt": (json.dumps({"messages": question("x" * 3_000_000)}).encode(), 400),
    "10 MB prompt": (json.dumps({"messages": question("x" * 10_000_000)}).encode(), 413),
    "prompt beyond the positions": (json.dumps({"messages": question("w " * 9_000)}).encode(), 400),
    "decompression bomb": (json.dumps({"messages": question("a", huge_png())}).encode(), 400),
    "file URL": (json.dumps({"messages": question("a", "file:///etc/passwd")}).encode(), 400),
    "path": (json.dumps({"messages": question("a", "../../etc/passwd")}).encode(), 400),
    "remote URL": (json.dumps({"messages": question("a", "http://127.0.0.1:1/a.png")}).encode(), 400),
    "broken picture": (json.dumps({"messages": question("a", data_url()[:-40])}).encode(), 400),
    "too many pictures": (json.dumps({"messages": question("a", *[data_url()] * 9)}).encode(), 400),
    "too many tokens": (json.dumps({"messages": question(), "max_tokens": 10**7}).encode(), 400),
    "NaN": (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400),
    "huge number": (b'{"messages": [{"role": "user", "content": "a"}], "seed": 1' + b"0" * 5000 + b"}", 400),
    "lone surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_get_a_4xx_with_a_reason_and_the_server_goes_on(server, name):
    data, expected = HOSTILE[name]
    started = time.monotonic()
    status, answer = post(server, data)
    assert status == expected, answer
    assert answer["error"]["message"]
    assert time.monotonic() - started < 20
    assert_serves(server)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Content_Type": "text/plain"}, 415),  # what another web site's form could send
        ({"Content_Encoding": "gzip"}, 415),
        ({"Host": "evil.example"}, 400),  # a name that was made to point here
    ],
)
def test_what_browsers_of_strangers_could_send_is_refused(server, headers, expected):
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps({"messages": question()}).encode(),
        {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()},
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=30)
    assert error.value.code == expected


@pytest.mark.parametrize("path", ["/../etc/passwd", "/examples/..%2f..%2fetc%2fpasswd", "/examples/x", "/%00", "/docs"])
def test_no_path_leads_to_a_file(server, path):
    status, data = get(server, path)
    assert status in (400, 404)
    assert b"root:" not in data


def test_a_body_that_never_comes_is_given_up(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    assert_serves(server)


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error_of_the_servers(server, caplog):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        time.sleep(0.2)
    deadline = time.monotonic() + 30
    while b'moellava_requests_total{status="499"}' not in get(server, "/metrics")[1]:
        assert time.monotonic() < deadline, "nobody noticed"
        time.sleep(0.05)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
    assert_serves(server)


def test_half_sent_requests_and_a_client_that_does_not_read_keep_nobody_waiting(server, client):
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            half = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
            half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: local")
        silent = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
        data = json.dumps({"messages": question(), "max_tokens": 200, "stream": True}).encode()
        silent.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(data) + data
        )
        assert_serves(server)
    while server.engine.busy:  # its row is given back
        time.sleep(0.05)


def test_a_client_that_never_reads_gives_its_place_back():
    """Small answers fit into the buffers between the two; of a large one sending waits for ever."""
    from megatron_moellava.serving.server import EventStream

    closed = []

    async def events():
        try:
            while True:
                yield "data: x\n\n"
        finally:
            closed.append("events")

    async def never(message=None):
        await asyncio.sleep(3600)

    async def send(message):
        if message["type"] == "http.response.body":
            await never()

    stream = EventStream(events(), lambda: closed.append("place"), seconds=0.05)
    asyncio.run(asyncio.wait_for(stream({"type": "http"}, never, send), timeout=20))
    assert closed == ["events", "place"]


def test_a_client_that_leaves_in_the_middle_frees_its_row(server, client):
    short = json.dumps({"messages": question("hi"), "max_tokens": 3}).encode()
    expected = post(server, short)[1]["choices"]
    stream = client.chat.completions.create(model="tiny", messages=question(), max_tokens=900, stream=True)
    next(iter(stream))
    stream.close()
    assert post(server, short)[1]["choices"] == expected
    assert_serves(server)


def test_neighbours_of_hostile_and_vanishing_clients_get_their_answers(server, client):
    messages = question("What is it?", data_url())
    expected = client.chat.completions.create(model="tiny", messages=messages, max_tokens=25).choices[0].message.content
    answers, statuses = [], []

    def honest():
        answers.append(client.chat.completions.create(model="tiny", messages=messages, max_tokens=25))

    def hostile(name):
        statuses.append(post(server, HOSTILE[name][0])[0])

    def vanishing():
        stream = client.chat.completions.create(model="tiny", messages=question(), max_tokens=900, stream=True)
        next(iter(stream))
        stream.close()

    names = ("decompression bomb", "10 MB prompt", "deep JSON")
    jobs = [threading.Thread(target=honest) for _ in range(4)]
    jobs += [threading.Thread(target=hostile, args=(name,)) for name in names] + [threading.Thread(target=vanishing)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(timeout=120)
    assert [answer.choices[0].message.content for answer in answers] == [expected] * 4
    assert len(statuses) == 3
    assert all(400 <= status < 500 for status in statuses)
    assert_serves(server)


def test_a_token_is_asked_for_and_open_requests_are_bounded():
    with serving(token="secret", max_open_requests=1) as running:
        data = json.dumps({"messages": question(), "max_tokens": 2}).encode()
        assert post(running, data)[0] == 401
        assert post(running, data, Authorization="Bearer wrong")[0] == 401
        assert get(running, "/v1/models")[0] == 401
        assert post(running, data, Authorization="Bearer secret")[0] == 200
        client = openai_client(running, "secret")
        stream = client.chat.completions.create(model="tiny", messages=question(), max_tokens=900, stream=True)
        next(iter(stream))
        assert post(running, data, Authorization="Bearer secret")[0] == 429
        stream.close()


def test_an_answer_that_takes_too_long_ends_with_an_error():
    with serving(request_seconds=0.05) as running:
        data = json.dumps({"messages": question(), "max_tokens": 900}).encode()
        assert post(running, data)[0] == 504
        while running.engine.busy:  # the row is given back
            time.sleep(0.05)


def test_a_failed_engine_says_so_to_everyone():
    with serving() as running:
        running.engine.forward.model = None  # the next step cannot work
        data = json.dumps({"messages": question(), "max_tokens": 2}).encode()
        assert post(running, data)[0] == 503
        assert post(running, data)[0] == 503
        assert get(running, "/health")[0] == 503


def test_the_page_is_shown_a_file_of_levels_as_the_model_sees_it_or_told_what_is_wrong(tmp_path):
    write_pictures(tmp_path)
    Image.new("L", (8, 8)).save(tmp_path / "flat.png")

    def asked(file: str, modality: str = "depth") -> bytes:
        content = base64.b64encode((tmp_path / file).read_bytes()).decode()
        return json.dumps({"modality": modality, "url": f"data:image/levels;base64,{content}"}).encode()

    with serving(engine_options={"modalities": (DEPTH,)}, token="secret") as running:
        key = {"Authorization": "Bearer secret"}
        status, body = post(running, asked("depth/0.png"), "/shown", **key)
        with Image.open(io.BytesIO(base64.b64decode(body["url"].partition(",")[2]))) as image:
            expected, _ = open_picture(str(tmp_path / "depth/0.png"), DEPTH, "depth")
            assert status == 200 and image.mode == "RGB" and image.tobytes() == expected.tobytes()
        refused = {
            "holds uint8, and 'depth' of data.modalities declares levels=uint16": asked("flat.png"),
            "the body must be {modality, url} of a modality that the checkpoint has": asked("depth/0.png", "thermal"),
            "the body is not valid JSON": b"{",
            "depth_url must be a data: URL": json.dumps({"modality": "depth", "url": "file:///etc/passwd"}).encode(),
        }
        for said, data in refused.items():
            status, body = post(running, data, "/shown", **key)
            assert status == 400 and said in body["error"]["message"]
        assert post(running, asked("depth/0.png"), "/shown")[0] == 401
        assert running.service.open_requests == 0
