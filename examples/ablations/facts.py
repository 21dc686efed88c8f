"""The names benchmark in minutes: the same things and names, each thing a pattern of noise instead of a picture.

What experts are for is how many facts a model holds, so perception is made trivial: a thing is one patch of 8 x 8 random
pixels, seen each time with other noise on top, through a frozen random tower (one visual token). The answer is its name in
eight languages, as native speakers gave them for Unicode's CLDR (`quickstart/names.py`), one after the other: nearly every
token is trained on. Everything after that is what all runs have: LLaVA JSON and pictures, a checkpoint to start from, the
trainer. Written to OUT: data/ (facts.json, test.jsonl, tokenizer.model, images/) and start/ (a random language model and
the tower).

With --pictures things are OpenMoji's pictures instead, seen at other sizes and places and before other backgrounds, and the
tower is the quickstart's, pretrained on them; data/ceiling.json says how many held-out pictures it can tell apart. With
--vendors they are those of three vendors, and it is asked about a fourth's, drawn in another style.
"""

import argparse
import json
import random
import sys
from functools import partial
from pathlib import Path

from megatron_moellava.commands.program import COUNT

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from names import (
    LANGUAGES,
    Thing,
    caption,
    llava_row,
    read_things,
    render,
    require_packages,
    save_new,
    write_attribution,
    write_lines,
    write_rows,
)
from names_full import HELD_OUT, add_credits, drawings, read_full_things, read_icons, require_vendors

SIDE = 8  # pixels of a pattern's side: one patch of the tower
NOISE = 20.0  # standard deviation of what a view adds, in levels of 255; the patterns' own is 74
VOCABULARY = 1024  # pieces of the tokenizer, 256 of them bytes
QUESTION = "names"
MAX_QUESTIONS = 500  # held out, each for eight facts


def write_facts(
    out: Path, *, things: int | None, views: int, pictures: bool = False, vendors: Path | None = None, seed: int = 0
) -> dict[str, int]:
    """Views, rows, questions and tokenizer; returns the counts. A question's view is none that a row has.

    `vendors`: a node_modules with what `names_full.py` fetches; `views` are then of each of three vendors.
    """
    require_packages()
    if vendors is None:
        chosen, draw_views = read_things(things, seed), write_pictures if pictures else write_views
    else:
        chosen, draw_views = vendor_things(vendors, things, seed), partial(write_vendors, vendors)
    rows, tests, captions = [], [], []
    for thing in chosen:
        images = draw_views(out / "images", thing, views + 1, seed)
        captions += [caption(thing, image) for image in images[:-1]]
        rows += [llava_row(image, [(QUESTION, answer_of(thing))], 0, "names") for image in images[:-1]]
        tests.append(question_of(thing, images[-1]))
    draw = random.Random(seed)
    draw.shuffle(rows)
    draw.shuffle(tests)
    write_rows(out / "facts.json", rows)
    write_lines(out / "test.jsonl", tests[:MAX_QUESTIONS])
    write_rows(out / "captions.json", captions)
    if pictures or vendors is not None:
        write_attribution(out / "images" / "names")
    if vendors is not None:
        add_credits(out / "images" / "names")
    write_tokenizer(out, rows)
    counts = {
        "things": len(chosen),
        "facts": len(tests) * len(LANGUAGES),
        "rows": len(rows),
        "questions": len(tests[:MAX_QUESTIONS]),
    }
    (out / "counts.json").write_text(json.dumps(counts))
    return counts


def write_views(folder: Path, thing: Thing, count: int, seed: int) -> list[str]:
    """So many noisy pictures of the thing's pattern, below `folder`; their names."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng([seed, *thing.code.encode()])
    pattern_HWC = draw.uniform(0.0, 255.0, (SIDE, SIDE, 3))
    names = [f"{thing.code}-{view}.png" for view in range(count)]
    for name in names:
        seen_HWC = (pattern_HWC + NOISE * draw.standard_normal(pattern_HWC.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(seen_HWC).save(folder / name, compress_level=0)
    return names


def write_pictures(folder: Path, thing: Thing, count: int, seed: int) -> list[str]:
    """So many different views of the thing's picture, below `folder`; their names."""
    draw, seen = random.Random(f"{seed} {thing.code}"), set()
    names = [f"names/{thing.code}-{view}.png" for view in range(count)]
    for name in names:
        save_new(partial(render, thing.svg), folder / name, draw, seen)
    return names


def vendor_things(packages: Path, count: int | None, seed: int) -> list[Thing]:
    """So many of the things (all) of which every vendor has a picture, with CLDR's names."""
    require_vendors(packages)
    icons = read_icons(packages)
    known = [thing for thing in read_full_things(packages) if HELD_OUT in drawings(packages, thing, icons)]
    return known if count is None else random.Random(seed).sample(known, min(count, len(known)))


def write_vendors(packages: Path, folder: Path, thing: Thing, count: int, seed: int) -> list[str]:
    """`count` - 1 views of the thing's picture by each vendor but the last, and one of the last vendor's; their names."""
    draw, names = random.Random(f"{seed} {thing.code}"), []
    for vendor, picture in drawings(packages, thing, read_icons(packages)).items():
        own = range(1 if vendor == HELD_OUT else count - 1)
        seen: set[bytes] = set()
        for view in own:
            names.append(f"names/{vendor}/{thing.code}-{view}.png")
            save_new(picture, folder / names[-1], draw, seen)
    return names


def answer_of(thing: Thing) -> str:
    """`"cat, katze, gato, chat, gatto, gato, wajah kucing, kedi"`"""
    return ", ".join(thing.names[language] for language in LANGUAGES)


def question_of(thing: Thing, image: str) -> dict:
    """All names of the thing, asked from a picture. `facts`: how many its answer holds."""
    row = {"question_id": thing.code, "image": image, "question": QUESTION, "answer": answer_of(thing)}
    return row | {"type": "names", "facts": len(LANGUAGES)}


def write_tokenizer(out: Path, rows: list[dict]) -> None:
    """A SentencePiece model of each fact's text, once."""
    from make_data import train_tokenizer

    train_tokenizer(out, [row for row in rows if row["image"].endswith("-0.png")], VOCABULARY)


def write_start(
    out: Path, data: Path, *, layers: int, hidden: int, ffn: int, pictures: bool = False, seed: int
) -> None:
    """A Megatron checkpoint of a random language model and the tower."""
    from dataclasses import replace

    from models import write_language_model

    from megatron_moellava.backbones import get_backbone
    from megatron_moellava.conversion.imports import import_checkpoint
    from megatron_moellava.towers import get_tower

    backbone = replace(
        get_backbone("llama-tiny"),
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        kv_channels=hidden // 4,
        vocab_size=VOCABULARY,
    )
    write_language_model(out / "language_model", backbone, data / "tokenizer.model", seed)
    (write_trained_tower if pictures else write_random_tower)(out / "tower", get_tower("clip-tiny"), data, seed)
    import_checkpoint(out / "language_model", save=out / "start", tower=str(out / "tower"), dtype="float32", seed=seed)


def write_random_tower(folder: Path, tower, data: Path, seed: int) -> None:
    """A tower with the random weights of `seed`, which shows a pattern as one visual token."""
    from dataclasses import replace

    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from megatron_moellava.towers.from_config import hf_config_of, processor_config_of

    small = replace(tower, image_size=SIDE, patch_size=SIDE, num_layers=2, hidden_size=64, ffn_hidden_size=64)
    torch.manual_seed(seed)
    config = hf_config_of(small)
    config.pop("model_type")
    CLIPVisionModel(CLIPVisionConfig(**config)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor_config_of(small)))


def write_trained_tower(folder: Path, tower, data: Path, seed: int) -> None:
    """The quickstart's tower, pretrained on the captions of the pictures to train on; and data/ceiling.json."""
    from models import TOWER_STEPS, write_tower
    from retrieval import retrieval_ceiling

    write_tower(folder, tower, data / "captions.json", data / "images", seed, TOWER_STEPS["names"])
    known = sorted({row["image"] for row in json.loads((data / "captions.json").read_text())})
    tests = [json.loads(line)["image"] for line in (data / "test.jsonl").read_text().splitlines()]
    (data / "ceiling.json").write_text(json.dumps(retrieval_ceiling(folder, tower, data / "images", known, tests)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--things", type=COUNT, help="so many of the emoji (all, about 1,900); each has eight names")
    parser.add_argument("--views", type=COUNT, default=4, help="noisy pictures of each to train on (4)")
    parser.add_argument("--layers", type=COUNT, default=2, help="of the language model (2)")
    parser.add_argument("--hidden", type=COUNT, default=64, help="its hidden size (64)")
    parser.add_argument("--ffn", type=COUNT, default=128, help="the width of its FFNs (128)")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--pictures", action="store_true", help="OpenMoji's pictures instead of patterns of noise")
    kinds.add_argument(
        "--vendors", type=Path, metavar="NODE_MODULES", help="pictures by four vendors, which `make names-full` fetches"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the weights; the data are the same for every seed")
    args = parser.parse_args()
    from megatron_moellava.config import MoELlavaError

    kind = {"pictures": args.pictures, "vendors": args.vendors}
    sizes = {"layers": args.layers, "hidden": args.hidden, "ffn": args.ffn}
    has_pictures = args.pictures or args.vendors is not None
    try:
        print(write_facts(args.out / "data", things=args.things, views=args.views, **kind))
        write_start(args.out, args.out / "data", **sizes, pictures=has_pictures, seed=args.seed)
    except MoELlavaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
