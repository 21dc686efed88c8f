"""Data figures: image throughput beside Pillow's own, loader throughput, packing and balance.

  python -m benchmarks.data [--images 300] [--seconds 10] [--quickstart runs/quickstart/data]

Prints one flat JSON object on stdout. All rates are of one worker, in CPU seconds, so that other work on the machine
does not change them much.

images/...      synthetic photographs (smooth noise, 640 x 480, JPEG quality 90) through Pillow alone (decode, pad, bicubic
                resize: the ceiling) and through the loader's path to normalised pixels, in turns in the same run
loader/...      a LLaVA JSON of such photographs on disk, read, tokenised, packed and decoded by the training loader
quickstart/...  packing and loader of the quickstart's conversations, if its data are there
law ...         packing and balance on the 665k lengths of data/length_distribution.py, samples up to 2,048 tokens
native ...      balance with pictures at native resolution, videos ... with pooled videos (benchmarks/balance.py)
"""

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.balance import LONGEST, RANKS, balance_figures, imbalance
from megatron_moellava.config import DataConfig, Source
from megatron_moellava.data import media
from megatron_moellava.data.images import pad_to_square
from megatron_moellava.data.length_distribution import packing_bound, sample_lengths
from megatron_moellava.data.loader import build_encoder, build_train_loader
from megatron_moellava.data.sample import ImageRef
from megatron_moellava.data.sources import open_source
from megatron_moellava.data.statistics import packing, token_lengths
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.towers import get_tower

TOKENIZER = Path(__file__).parents[1] / "tests" / "golden" / "assets" / "tok_bpe"
TOWERS = {"clip 336": "clip-vit-large-patch14-336", "siglip 384": "siglip-so400m-patch14-384"}
LAWS = (  # tokens per row, features per image, samples that the packer sees
    (2048, 576, 128),
    (4096, 576, 64),
    (4096, 576, 128),
    (4096, 729, 128),
    (8192, 576, 128),
)


def photograph(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC))
    noisy = (smooth + rng.normal(0, 6, (480, 640, 3))).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def image_figures(folder: str, count: int) -> dict:
    found = {}
    for name, tower in TOWERS.items():
        for aspect in ("pad", "square"):
            found |= _race(folder, count, get_tower(tower), aspect, f"images/{name} {aspect}")
    return found


def _race(folder: str, count: int, tower, aspect: str, name: str) -> dict:
    seconds = {"pillow": 0.0, "loader": 0.0}
    for number in range(count):
        start = time.process_time()
        _ceiling(f"{folder}/{number}.jpg", tower, aspect)
        middle = time.process_time()
        media.pixels(ImageRef(name=f"{number}.jpg"), folder, "row", tower, aspect)
        seconds["pillow"] += middle - start
        seconds["loader"] += time.process_time() - middle
    rates = {f"{name}/{key} images per second": round(count / value) for key, value in seconds.items()}
    return rates | {f"{name}/share of pillow": round(seconds["pillow"] / seconds["loader"], 3)}


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
    tokens, has_image = sample_lengths(3000 * RANKS, features, min(LONGEST, seq_length))
    rows = packing(tokens, seq_length, buffer)
    filled = [tokens[row].sum() / seq_length for row in rows]
    images = [has_image[row].sum() for row in rows]
    attention = [(tokens[row].astype(float) ** 2).sum() for row in rows]
    shuffled = np.random.default_rng(0).permutation(attention)
    name = f"law {seq_length} tokens, {features} features, buffer {buffer}"
    return {
        f"{name}/useful share": round(float(np.mean(filled)), 4),
        f"{name}/best possible useful share": round(min(1.0, packing_bound(tokens, seq_length, 16)), 4),
        f"{name}/images, busiest over mean": imbalance(images),
        f"{name}/attention, busiest over mean": imbalance(attention),
        f"{name}/attention in random order": imbalance(shuffled),
    }


def write_rows(folder: Path, count: int) -> Path:
    """LLaVA rows over `count` images, with questions as long as in the 665k law."""
    tokens, has_image = sample_lengths(4 * count, 576, LONGEST)
    rows = []
    for number, (length, image) in enumerate(zip(tokens, has_image, strict=True)):
        words = "a red cup " * max(1, int(length - 576 * image - 40) // 6)
        turns = [("human", "<image>\n" * int(image) + "What is there?"), ("gpt", words.strip())]
        row = {"id": str(number), "conversations": [{"from": role, "value": text} for role, text in turns]}
        rows.append(row | ({"image": f"{number % count}.jpg"} if image else {}))
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def loader_figures(data: DataConfig, tower, name: str, seconds: float) -> dict:
    """One worker's rates: the loader runs in this process, so that its CPU time can be told from other work."""
    tokenizer = load_tokenizer(data.tokenizer)
    with tempfile.TemporaryDirectory() as cache:
        source = open_source(data.sources[0], cache)
        encoder = build_encoder(data, tokenizer, tower)
        tokens, *_ = token_lengths(source.index, encoder, limit=5000)
        share = {"seed": 0, "rank": 0, "world_size": 1, "micro_batch_size": 1}
        loader = build_train_loader(data, tokenizer, tower, cache_folder=cache, **share)
        next(loader)
        start, rows, samples, images, used = time.process_time(), 0, 0, 0, 0
        while time.process_time() - start < seconds:
            batch = next(loader)
            rows, samples, images = rows + 1, samples + len(batch.sample_ids), images + len(batch.pixel_values_NCHW)
            used += int(batch.padding_mask_BS.sum())
        spent = time.process_time() - start
        loader.close()
    grouped = [part for part in np.array_split(tokens, max(1, len(tokens) // 8)) if len(part)]
    return {
        f"{name}/samples per second": round(samples / spent, 1),
        f"{name}/images per second": round(images / spent, 1),
        f"{name}/useful share, packed": round(used / (rows * data.seq_length), 4),
        f"{name}/useful share, padded to the longest of 8": round(
            float(tokens.sum() / sum(len(part) * part.max() for part in grouped)), 4
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300, help="photographs (300)")
    parser.add_argument("--seconds", type=float, default=10, help="CPU seconds of each loader (10)")
    parser.add_argument("--quickstart", default="runs/quickstart/data", help="data of `make quickstart`, if there")
    arguments = parser.parse_args()
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.images):
            (Path(folder) / f"{number}.jpg").write_bytes(photograph(number))
        report |= image_figures(folder, arguments.images)
        source = Source(path=str(write_rows(Path(folder), arguments.images)), image_folder=folder)
        common = {"sources": (source,), "tokenizer": str(TOKENIZER), "template": "phi", "num_workers": 0}
        data = DataConfig(**common, seq_length=4096, max_sample_length=LONGEST)
        report |= loader_figures(data, get_tower(TOWERS["clip 336"]), "loader/clip 336", arguments.seconds)
    for law in LAWS:
        report |= law_figures(*law)
    report |= balance_figures()
    quickstart = Path(arguments.quickstart)
    if (quickstart / "conversations.json").exists():
        source = Source(path=str(quickstart / "conversations.json"), image_folder=str(quickstart / "images"))
        common = {"sources": (source,), "tokenizer": str(quickstart / "tokenizer.model"), "template": "short"}
        data = DataConfig(**common, seq_length=2048, num_workers=0)
        report |= loader_figures(data, get_tower("clip-tiny"), "quickstart", arguments.seconds)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
