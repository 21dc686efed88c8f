"""Small data sets on disk for the data tests."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_moellava.config import DataConfig, Source
from megatron_moellava.data.encoder import Encoder
from megatron_moellava.data.loader import build_train_loader
from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.towers import get_tower
from tests.helpers.paths import ASSETS

TOWER = get_tower(str(ASSETS / "openai/clip-tiny"))  # 28 px, 16 tokens
WORDS = ("Is", "it", "raining?", "No,", "the", "sky", "is", "clear", "and", "blue", "over", "lake", "car", "tree")


def conversation(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def row(number: int, image: str | None = "a.png", **changes) -> dict:
    """A good row whose length depends on its number."""
    words = " ".join(WORDS[(number + i) % len(WORDS)] for i in range(3 + number * 7 % 40))
    question = f"<image>\n{words}?" if image else f"{words}?"
    base = {"id": f"id{number}", "conversations": conversation(question, f"answer {number}")}
    return base | ({"image": image} if image else {}) | changes


def pair_row(number: int, **changes) -> dict:
    """A good row of preferences: with one picture, with none, with two, in turn."""
    words = " ".join(WORDS[number % 3 : number % 3 + 4])
    images = [{"image": "a.png"}, {}, {"images": ["a.png", "b.png"]}][number % 3]
    answers = {"chosen": f"yes, {words}", "rejected": f"no {number}"}
    return {"id": f"id{number}", "prompt": f"{words}?"} | images | answers | changes


def write_rows(folder: Path, rows: list, name: str = "rows.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def write_images(folder: Path, names=("a.png", "b.png")) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        pixels = np.random.default_rng(seed).integers(0, 255, (30 + seed, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def make_set(folder: Path, count: int = 40) -> Path:
    """`count` good rows, every third without an image."""
    write_images(folder)
    return write_rows(folder, [row(i, (None, "a.png", "b.png")[i % 3]) for i in range(count)])


def make_videos(folder: Path, count: int = 40) -> Path:
    """`count` good rows: with a video, which is a folder of 3 to 9 frames, with a picture, and with text alone in turn."""
    write_images(folder)
    for number in range(0, count, 3):
        write_images(folder / f"film{number}", [f"{frame}.png" for frame in range(3 + number % 7)])
    rows = [row(number, (None, "a.png", None)[number % 3]) for number in range(count)]
    for number in range(0, count, 3):
        rows[number] |= {"video": f"film{number}", "conversations": conversation("<video>\nwhat?", f"answer {number}")}
    return write_rows(folder, rows)


def config(*paths: Path, weights=None, **changes) -> DataConfig:
    weights = weights or [1.0] * len(paths)
    sources = tuple(
        Source(path=str(path), image_folder=str(path if path.is_dir() else path.parent), weight=weight)
        for path, weight in zip(paths, weights, strict=True)
    )
    base = {"sources": sources, "template": "phi", "seq_length": 256, "num_workers": 0, "packing_buffer": 16}
    return DataConfig(**base | changes)


def make_loader(data: DataConfig, *, seed=1, rank=0, world_size=1, micro_batch_size=2, pad_multiple=4, **more):
    tokenizer = load_tokenizer(ASSETS / "tok_bpe")
    return build_train_loader(
        data,
        tokenizer,
        TOWER,
        seed=seed,
        rank=rank,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        pad_multiple=pad_multiple,
        **more,
    )


def encoder(tokenizer, **options) -> Encoder:
    """Of the phi template, 16 visual tokens an image, at most 512 tokens."""
    return Encoder(
        **{"template": get_template("phi"), "tokenizer": tokenizer, "num_features": 16, "max_length": 512} | options
    )


def take(loader, count: int) -> list:
    return [next(loader) for _ in range(count)]


def ids(batches) -> list[str]:
    return [name for batch in batches for name in batch.sample_ids]
