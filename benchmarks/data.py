"""Data figures: image throughput beside Pillow's own, loader throughput, packing and balance.

  python benchmarks/data.py [--images 300] [--json FILE --image-folder DIR --tokenizer PATH --template NAME --tower NAME]

Images: synthetic photographs (smooth noise, 640 x 480, JPEG quality 90) through Pillow alone (decode, pad, resize: the
ceiling) and through the loader's path to normalised pixels, on one core, in turns in the same run. Packing and balance:
the 665k length law of megatron_moellava/data/law.py, and any JSON given.
"""

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_moellava.config import DataConfig, Source
from megatron_moellava.data import media
from megatron_moellava.data.images import pad_to_square
from megatron_moellava.data.index import index_json
from megatron_moellava.data.law import sample_lengths
from megatron_moellava.data.loader import build_encoder, build_train_loader
from megatron_moellava.data.sample import ImageRef
from megatron_moellava.data.statistics import describe, packing, token_lengths
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.towers import get_tower

RANKS = 8


def photograph(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    grain = rng.normal(0, 6, (480, 640, 3))
    buffer = io.BytesIO()
    Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def throughput(count: int) -> dict:
    """Images per second and core; the two ways take turns, so that other work on the machine meets both."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            (Path(folder) / f"{number}.jpg").write_bytes(photograph(number))
        for name in ("clip-vit-large-patch14-336", "siglip-so400m-patch14-384"):
            for aspect in ("pad", "square"):
                results[f"{name} {aspect}"] = _race(folder, count, get_tower(name), aspect)
    return results


def _race(folder: str, count: int, tower, aspect: str) -> dict:
    seconds = {"pillow": 0.0, "loader": 0.0}
    for number in range(count):
        start = time.process_time()
        _ceiling(f"{folder}/{number}.jpg", tower, aspect)
        middle = time.process_time()
        media.pixels(ImageRef(name=f"{number}.jpg"), folder, "row", tower, aspect)
        seconds["pillow"] += middle - start
        seconds["loader"] += time.process_time() - middle
    rates = {f"{key} images/s": round(count / value) for key, value in seconds.items()}
    return rates | {"share of Pillow": round(seconds["pillow"] / seconds["loader"], 3)}


def _ceiling(path: str, tower, aspect: str) -> None:
    """Pillow's work alone: decode, pad or shortest edge, bicubic."""
    image, size = Image.open(path).convert("RGB"), tower.image_size
    if aspect == "pad":
        image = pad_to_square(image, tower.pad_color)
    short = min(image.size)
    square = tower.resize == "square"
    shape = (size, size) if square else tuple(int(size * side / short) for side in image.size)
    image.resize(shape, Image.Resampling.BICUBIC)


def law_figures(seq_length: int, features: int, buffer: int) -> dict:
    """Useful share, and busiest rank over the mean of RANKS ranks per step, by images and by attention cost."""
    filled, images, attention = [], [], []
    for rank in range(RANKS):
        tokens, has_image = sample_lengths(3000, features, seq_length, seed=rank)
        rows = packing(tokens, seq_length, buffer)
        filled.append([tokens[row].sum() / seq_length for row in rows])
        images.append([has_image[row].sum() for row in rows])
        attention.append([(tokens[row].astype(float) ** 2).sum() for row in rows])
    return {
        "useful": round(float(np.mean([np.mean(row) for row in filled])), 4),
        "images, busiest/mean": _imbalance(images),
        "attention, busiest/mean": _imbalance(attention),
        "attention in random order": _imbalance(
            [np.random.default_rng(i).permutation(r) for i, r in enumerate(attention)]
        ),
    }


def _imbalance(per_rank: list) -> float:
    steps = min(map(len, per_rank))
    table = np.array([row[:steps] for row in per_rank], dtype=float)
    table = table[:, table.mean(0) > 0]
    return round(float((table.max(0) / table.mean(0)).mean()), 3)


def json_figures(arguments: argparse.Namespace) -> dict:
    tower, tokenizer = get_tower(arguments.tower), load_tokenizer(arguments.tokenizer)
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        index = index_json(arguments.json, cache)
        for seq_length in arguments.seq_length:
            source = Source(path=arguments.json, image_folder=arguments.image_folder)
            data = DataConfig(sources=(source,), template=arguments.template, seq_length=seq_length, num_workers=1)
            tokens, images = token_lengths(index, build_encoder(data, tokenizer, tower), limit=5000)
            loader = build_train_loader(
                data, tokenizer, tower, seed=0, rank=0, world_size=1, micro_batch_size=1, cache_folder=cache
            )
            next(loader)
            start, samples = time.perf_counter(), 0
            while time.perf_counter() - start < 5:
                samples += len(next(loader).sample_ids)
            rate = samples / (time.perf_counter() - start)
            loader.close()
            useful = describe(tokens, images, seq_length, data.packing_buffer)
            found[seq_length] = {"samples/s, one worker": round(rate)} | useful
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--json", help="LLaVA JSON to measure as well")
    parser.add_argument("--image-folder", default="")
    parser.add_argument("--tokenizer")
    parser.add_argument("--template", default="v1")
    parser.add_argument("--tower", default="clip-vit-large-patch14-336")
    parser.add_argument("--seq-length", type=int, nargs="+", default=[512, 1024])
    arguments = parser.parse_args()
    report = {"images": throughput(arguments.images)}
    for seq_length, features, buffer in (
        (2048, 576, 64),
        (4096, 576, 64),
        (4096, 576, 128),
        (4096, 729, 128),
        (8192, 576, 256),
    ):
        name = f"665k law, {features} features, rows of {seq_length}, buffer {buffer}"
        report[name] = law_figures(seq_length, features, buffer)
    if arguments.json:
        report["json"] = json_figures(arguments)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
