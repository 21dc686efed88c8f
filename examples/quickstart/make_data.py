"""The quickstart's data: published questions about images, written as LLaVA JSON + an image folder.

`fast`: easy-VQA (https://github.com/vzhou842/easy-VQA, MIT; 4,000 train and 1,000 test images, official split).
`names`: besides, pictures of emoji and what they are called in eight languages (`names.py`): names.json, names_test.jsonl.
`full`: besides easy-VQA, compositions of scikit-learn's 1,797 real handwritten digits; no digit is in both splits.
Written to OUT: images/, captions.json (stage 1), conversations.json (stages 2 and 3), test.jsonl, tokenizer.model.
Everything is derived from the train split but for test.jsonl and its images. The same seed gives the same files.
"""

import argparse
import json
import random
import re
import shutil
from collections import defaultdict
from pathlib import Path

from digits import write_digits
from names import write_names
from plans import THINGS, VIEWS

from megatron_moellava.commands.program import COUNT, number

COLORS = "black|blue|brown|gray|green|red|teal|yellow"
SHAPES = "circle|rectangle|triangle"
CAPTIONS = ("{}.", "the image shows {}.", "a picture of {}.", "this is {}.")
VOCABULARY = 512  # pieces of the SentencePiece model, 256 of them bytes


def write_quickstart(out: Path, *, preset: str = "fast", turns: int = 3, text_rows: int = 400, seed: int = 0) -> dict:
    """Write everything; returns the counts. A folder that already holds the same data is left alone."""
    wanted = {"preset": preset, "turns": turns, "text_rows": text_rows, "seed": seed, "format": 1}
    if preset == "names":
        wanted["names"] = [THINGS, VIEWS]
    summary_file = out / "summary.json"
    if summary_file.exists() and (summary := json.loads(summary_file.read_text()))["wanted"] == wanted:
        print(f"{out} already holds this data")
        return summary
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    questions, captions, tests = write_easy_vqa(out, rng)
    named: list[dict] = []
    if preset == "names":
        made = write_names(out, things=THINGS, views=VIEWS, at_once=True, seed=seed)
        captions.extend(made["captions"])
        named = made["rows"]
    if preset == "full":
        for rows, more in zip((questions, captions, tests), write_digits(out, rng), strict=True):
            rows.extend(more)
    rows = [*conversations(questions, turns, rng), *text_only(text_rows, turns, rng)]
    rng.shuffle(rows)
    rng.shuffle(captions)
    write_json(out / "captions.json", captions)
    write_json(out / "conversations.json", rows)
    with open(out / "test.jsonl", "w") as file:
        file.writelines(json.dumps(test) + "\n" for test in tests)
    train_tokenizer(out, rows + captions + named)
    counts = {"captions": len(captions), "conversations": len(rows), "test_questions": len(tests)}
    counts |= {"names": len(named)} if named else {}
    summary = {"wanted": wanted, **counts}
    write_json(summary_file, summary)
    print(f"{out}: {counts}")
    return summary


def write_easy_vqa(out: Path, rng: random.Random):
    """(train questions as (image, question, answer, type), caption rows, test rows)"""
    import easy_vqa
    from tqdm import tqdm

    splits = (("train", easy_vqa.get_train_image_paths()), ("test", easy_vqa.get_test_image_paths()))
    for split, paths in splits:
        folder = out / "images" / "easy_vqa" / split
        folder.mkdir(parents=True, exist_ok=True)
        for index, path in tqdm(sorted(paths.items()), desc=f"easy-VQA {split} images", unit=""):
            shutil.copyfile(path, folder / f"{index}.png")
    train = [
        (f"easy_vqa/train/{i}.png", q, a, kind(a)) for q, a, i in zip(*easy_vqa.get_train_questions(), strict=True)
    ]
    captions = [
        row(image, [("<image>\ndescribe the image.", rng.choice(CAPTIONS).format(text))])
        for image, text in describe(train).items()
    ]
    tests = [
        {"question_id": n, "image": f"easy_vqa/test/{i}.png", "question": q, "answer": a, "type": kind(a)}
        for n, (q, a, i) in enumerate(zip(*easy_vqa.get_test_questions(), strict=True))
    ]
    return train, captions, tests


def kind(answer: str) -> str:
    """existence (yes or no), color or shape"""
    if answer in ("yes", "no"):
        return "existence"
    return "color" if re.fullmatch(COLORS, answer) else "shape"


def describe(questions: list[tuple[str, str, str, str]]) -> dict[str, str]:
    """image -> "a red circle", as far as the image's own training questions tell."""
    facts: dict[str, dict[str, str]] = defaultdict(dict)
    for image, question, answer, _ in questions:
        for key, words in (("color", COLORS), ("shape", SHAPES)):
            named = re.search(words, question)
            if re.fullmatch(words, answer):
                facts[image][key] = answer
            elif named and (answer == "yes") != bool(re.search(r"\bno(t)?\b", question)) and answer in ("yes", "no"):
                facts[image].setdefault(key, named.group())
            elif named and answer not in ("yes", "no"):
                facts[image].setdefault(key, named.group())  # "what color is the circle?"
    return {image: f"a {f.get('color', '')} {f.get('shape', 'shape')}".replace("  ", " ") for image, f in facts.items()}


def conversations(questions, turns: int, rng: random.Random) -> list[dict]:
    """Rows of up to `turns` questions about one image, in random order; the tag is the types in that order."""
    by_image = defaultdict(list)
    for image, *question in questions:
        by_image[image].append(question)
    rows = []
    for image, asked in by_image.items():
        rng.shuffle(asked)
        for start in range(0, len(asked), turns):
            part = asked[start : start + turns]
            pairs = [(q if n else f"<image>\n{q}", a) for n, (q, a, _) in enumerate(part)]
            rows.append(row(image, pairs, number=start, tag="+".join(t for *_, t in part)))
    return rows


def row(image: str | None, pairs: list[tuple[str, str]], *, number: int = 0, tag: str = "") -> dict:
    name = image.rsplit(".", 1)[0].replace("/", "-") if image else f"text-{number}"
    turns = [{"from": role, "value": text} for pair in pairs for role, text in zip(("human", "gpt"), pair, strict=True)]
    base = {"id": f"{name}-{number}" if image else name, "conversations": turns}
    return base | ({"image": image} if image else {}) | ({"tag": tag} if tag else {})


def text_only(count: int, turns: int, rng: random.Random) -> list[dict]:
    """Rows without an image, about the words that the images are about."""
    colors, shapes = COLORS.split("|"), SHAPES.split("|")
    sides = {"circle": "none", "rectangle": "four", "triangle": "three"}
    facts = [(f"is {word} a color?", "yes" if word in colors else "no") for word in colors + shapes]
    facts += [(f"is a {word} a shape?", "yes" if word in shapes else "no") for word in shapes + colors]
    facts += [(f"how many sides does a {shape} have?", number) for shape, number in sides.items()]
    return [row(None, rng.sample(facts, min(turns, len(facts))), number=n, tag="text") for n in range(count)]


def train_tokenizer(out: Path, rows: list[dict], vocabulary: int = VOCABULARY) -> None:
    """A Llama-like SentencePiece model (BPE, byte fallback, <unk> <s> </s>) of the training text."""
    import sentencepiece

    turns = (turn["value"].replace("<image>\n", "") for row in rows for turn in row["conversations"])
    text = [f"USER: {turn} ASSISTANT: {turn}" for turn in turns]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(out / "tokenizer"),
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        split_digits=True,
        minloglevel=2,
        num_threads=1,
    )


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", choices=("names", "fast", "full"), default="fast")
    parser.add_argument("--turns", type=COUNT, default=3, help="questions per conversation (3)")
    parser.add_argument("--text-rows", type=number(int, least=0), default=400, help="rows without an image (400)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_quickstart(args.out, preset=args.preset, turns=args.turns, text_rows=args.text_rows, seed=args.seed)


if __name__ == "__main__":
    main()
