"""Malformed rows and images by the thousand: only BadSample or DataError may come out, and no good sample is lost.

FUZZ_SCALE=10 multiplies the number of examples, and `make fuzz` does so and says how many there were.
"""

import functools
import io
import json
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_moellava.config import DataError
from megatron_moellava.data import images, media
from megatron_moellava.data.encoder import Encoder
from megatron_moellava.data.index import index_json
from megatron_moellava.data.rows import read_rows
from megatron_moellava.data.sample import BadSample, parse_record
from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import load_tokenizer
from tests.helpers.data_files import ASSETS, TOWER, config, conversation, make_loader, row, write_images

SCALE = int(os.environ.get("FUZZ_SCALE", "1"))


RUNS: Counter[str] = Counter()


def fuzz(examples: int, *strategies):
    """Run the test on `examples` x SCALE draws, counted in RUNS."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]

    def decorate(test):
        @functools.wraps(test)
        def counted(*arguments, **named):
            RUNS[test.__name__] += 1
            return test(*arguments, **named)

        options = {"deadline": None, "suppress_health_check": health, "derandomize": True}
        return settings(max_examples=examples * SCALE, **options)(given(*strategies)(counted))

    return decorate


@pytest.fixture(scope="module", autouse=True)
def say_how_many():
    yield
    print(f"\nfuzzed {RUNS.total():,} inputs: {', '.join(f'{count:,} {name}' for name, count in RUNS.items())}")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4))
turns = st.fixed_dictionaries({}, optional={"from": st.sampled_from(["human", "gpt", "bot"]) | values, "value": values})
records = values | st.fixed_dictionaries(
    {},
    optional={
        "id": values,
        "image": values | st.lists(st.text(max_size=9), max_size=3),
        "video": values,
        "conversations": values | st.lists(turns, max_size=5),
        "tag": values,
    },
)
NASTY = [
    "</s>",
    "<s>",
    "<|endoftext|>",
    " ASSISTANT: ",
    "USER:",
    "<image",
    "image>",
    "###",
    "\n",
    "\0",
    "\u2028",
    "é☃𝒳",
]
texts = st.lists(st.text(max_size=12) | st.sampled_from(NASTY), max_size=6).map("".join)


@fuzz(1000, records)
def test_any_record_is_a_sample_or_a_bad_sample(record):
    try:
        sample = parse_record(record, origin="row")
    except BadSample as error:
        assert error.reason and str(error).startswith("row")
    else:
        placeholders = sum(turn.text.count("<image>") for turn in sample.turns)
        assert sample.turns and (not sample.images or placeholders == len(sample.images))


@fuzz(200, st.lists(st.binary(max_size=40) | st.integers(0, 9), max_size=12))
def test_good_lines_survive_any_neighbours(tmp_path, lines):
    junk = [line.replace(b"\n", b"").replace(b"\r", b"") if isinstance(line, bytes) else line for line in lines]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(row(x)).encode() for x in junk))
    wanted = [row(x) for x in junk if isinstance(x, int)]
    found = [record for _, record in read_rows(path) if isinstance(record, dict)]
    assert [record for record in found if "conversations" in record] == wanted


@fuzz(200, st.data())
def test_a_mutated_list_gives_rows_or_an_error(tmp_path, data):
    content = bytearray(json.dumps([row(i) for i in range(4)]).encode())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"rows{data.draw(st.integers(0, 10**9))}.json"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        index = index_json(path, tmp_path / "cache")
        assert index.rows == len(list(read_rows(path)))
    except DataError as error:
        assert "rows" in str(error)
    finally:
        path.unlink()


@pytest.fixture(scope="module", params=["tok_bpe", "tok_spm"])
def encoder(request):
    template = get_template("phi" if request.param == "tok_bpe" else "v1")
    tokenizer = load_tokenizer(ASSETS / request.param)
    return Encoder(template=template, tokenizer=tokenizer, num_features=16, max_length=400)


@fuzz(300, st.lists(texts, min_size=2, max_size=6))
def test_any_text_is_encoded_with_one_end_per_answer(encoder, parts):
    parts = [part.encode("utf-8", "ignore").decode().replace("<image>", "") for part in parts]
    try:
        sample = parse_record({"conversations": conversation(*parts)}, origin="row")
        encoded = encoder(sample)
    except BadSample as error:
        assert error.reason in ("empty answer", "too long")
        return
    assert len(encoded.tokens_S) == len(encoded.labels_S) <= 400 and encoded.labels_S[-1] == -100
    trained = encoded.labels_S != -100
    assert (encoded.labels_S[:-1][trained[:-1]] == encoded.tokens_S[1:][trained[:-1]]).all()
    ends = (encoded.labels_S == encoder.tokenizer.token_id(encoder.template.end)).sum()
    answers = sum(bool(turn.text) for turn in sample.turns if turn.role == "assistant")
    assert ends == answers or "truncated" in encoded.notes


def _files() -> list[bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8))
    kinds = [
        ("JPEG", "RGB"),
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("GIF", "P"),
        ("WEBP", "RGBA"),
        ("TIFF", "I;16"),
        ("BMP", "L"),
    ]
    files = []
    for kind, mode in kinds:
        buffer = io.BytesIO()
        (noise.convert("I;16") if mode == "I;16" else noise.convert(mode)).save(buffer, kind)
        files.append(buffer.getvalue())
    return files


FILES = _files()


@fuzz(
    1000,
    st.sampled_from(FILES),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    st.floats(0, 1.3),
)
def test_any_bytes_are_an_image_or_a_bad_sample(data, changes, length):
    mutated = bytearray(data)
    for position, value in changes:
        mutated[min(int(position * len(mutated)), len(mutated) - 1)] = value
    mutated = bytes(mutated[: int(length * len(mutated))])
    try:
        image, _ = images.open_image(mutated, "row")
        assert image.mode == "RGB"
        if image.width * image.height < 10**6:
            pixels = images.preprocess(image, TOWER, "pad")
            assert pixels.shape == (3, 28, 28) and np.isfinite(pixels).all()
    except BadSample as error:
        assert error.reason in ("unreadable image", "decompression bomb") and str(error).startswith("row")


@fuzz(
    500,
    st.lists(st.sampled_from(["..", "/", ".", "a", "~", "link", "\\", "%2e", " ", "b.png"]), max_size=8).map("".join),
)
def test_no_name_leads_outside_the_image_folder(tmp_path, name):
    root = tmp_path / "images"
    root.mkdir(exist_ok=True)
    if not (root / "link").is_symlink():
        (root / "link").symlink_to("/etc")
    try:
        path = media.locate(str(root), name, "row")
    except BadSample:
        return
    assert os.path.commonpath([os.path.realpath(path), os.path.realpath(root)]) == os.path.realpath(root)


@fuzz(15, st.lists(records | st.binary(max_size=30), max_size=12))
def test_the_loader_delivers_every_good_row_among_bad_ones(tmp_path, junk):
    """Index, order, tokenise, pack, decode."""
    folder = write_images(tmp_path / "images")
    good = {f"good {number}": row(number, (None, "a.png")[number % 2], id=f"good {number}") for number in range(8)}
    lines = [x.translate(None, b"\r\n") if isinstance(x, bytes) else json.dumps(x).encode() for x in junk]
    for number, record in enumerate(good.values()):
        lines.insert(2 * number, json.dumps(record).encode())
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    source = config(path, max_skip_share=0.9).sources[0]
    data = replace(
        config(path, max_skip_share=0.9, packing_buffer=4), sources=(replace(source, image_folder=str(folder)),)
    )
    loader, found = make_loader(data), set()
    for _ in range(60):
        found |= set(next(loader).sample_ids)
    loader.close()
    assert found >= good.keys()
