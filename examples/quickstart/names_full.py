"""The large names benchmark, for ablations: pictures by four vendors, names in 28 languages of Unicode's CLDR.

  make names-full                                   fetch with npm into build/names-full, then write runs/names-full/data
  python examples/quickstart/names_full.py --packages build/names-full/node_modules --out DIR

Three vendors' pictures train; the fourth's, another style, is held out. Written to OUT: names.json, names_test.jsonl (the
vendor held out), names_seen_test.jsonl (new views of a vendor that trains), captions.json, images/ with ATTRIBUTION.md.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from names import (
    LANGUAGE_NAMES,
    VARIATION,
    Thing,
    caption,
    name_questions,
    name_rows,
    read_things,
    render,
    require_packages,
    save_new,
    write_attribution,
    write_lines,
    write_rows,
)

from megatron_moellava.commands.program import COUNT

CLDR, NOTO, TWEMOJI, FLUENT = (
    "cldr-annotations-full",
    "emoji-datasource-google",
    "emoji-datasource-twitter",
    "@iconify-json/fluent-emoji",
)
VERSIONS = {CLDR: "48.2.0", NOTO: "16.0.0", TWEMOJI: "16.0.0", FLUENT: "1.2.7"}
HELD_OUT = "fluent"
CREDITS = f"""
Further pictures: Noto Emoji by Google (Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0), as packaged in
{NOTO} {VERSIONS[NOTO]}; Twemoji by Twitter, Inc and other contributors (CC-BY-4.0,
https://creativecommons.org/licenses/by/4.0/), as packaged in {TWEMOJI} {VERSIONS[TWEMOJI]}; Fluent Emoji by Microsoft
Corporation (MIT, https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE), as packaged in {FLUENT}
{VERSIONS[FLUENT]}. Changed: scaled and placed on coloured backgrounds.

The names here are CLDR's own (Unicode License v3), as packaged in {CLDR} {VERSIONS[CLDR]}. Changed: lower case.
"""


def fetch(folder: Path) -> Path:
    """Install the packages with the npm client into `folder`, unless they are there; returns its node_modules."""
    from megatron_moellava.config import DataError

    packages = folder / "node_modules"
    if all((packages / name / "package.json").is_file() for name in VERSIONS):
        return packages
    if shutil.which("npm") is None:
        raise DataError(
            "the large names benchmark needs npm, which is not installed here (Debian and Ubuntu: apt-get install npm); or "
            f"copy a folder with {', '.join(VERSIONS)} from another machine and name it with --packages"
        )
    wanted = [f"{name}@{version}" for name, version in VERSIONS.items()]
    command = ["npm", "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", "--no-save"]
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {', '.join(wanted)} (250 MB) into {folder}", flush=True)
    if code := subprocess.run([*command, *wanted], check=False).returncode:
        raise DataError(f"npm ended with {code}: see its lines above; the same command tries again")
    return packages


def require_vendors(packages: Path) -> None:
    """DataError that names what `packages`, a node_modules, lacks of the vendors' pictures and the names."""
    from megatron_moellava.config import DataError

    if missing := [name for name in VERSIONS if not (packages / name).is_dir()]:
        raise DataError(f"{packages} has no {', '.join(missing)}; `make names-full` fetches them into build/names-full")


def read_names(packages: Path) -> dict[str, dict[str, str]]:
    """language -> emoji without variation selectors -> CLDR's short name."""
    return {
        language: {
            text.replace("\ufe0f", ""): entry["tts"][0].lower()
            for text, entry in _cldr(packages, language).items()
            if "tts" in entry
        }
        for language in LANGUAGE_NAMES
    }


def _cldr(packages: Path, language: str) -> dict[str, dict]:
    path = packages / CLDR / "annotations" / language / "annotations.json"
    return json.loads(path.read_text())["annotations"]["annotations"]


def read_full_things(packages: Path) -> list[Thing]:
    """The things that have a name in every language and a picture by each training vendor."""
    from dataclasses import replace

    names = read_names(packages)
    things = []
    for thing in read_things():
        text = "".join(chr(int(code, 16)) for code in thing.code.split("-")).replace("\ufe0f", "")
        own = {language: known[text] for language, known in names.items() if text in known}
        if len(own) == len(names) and all(_png(packages, vendor, thing) for vendor in (NOTO, TWEMOJI)):
            things.append(replace(thing, names=own))
    return things


def drawings(packages: Path, thing: Thing, icons: dict) -> dict[str, Callable]:
    """vendor -> what draws the thing at a size; the vendor held out is missing where it has no such picture."""
    found: dict[str, Callable] = {
        "openmoji": partial(render, thing.svg),
        "noto": partial(scaled, _png(packages, NOTO, thing)),
        "twemoji": partial(scaled, _png(packages, TWEMOJI, thing)),
    }
    slug = icons["aliases"].get(slug_of(thing.names["en"]), {}).get("parent", slug_of(thing.names["en"]))
    if slug in icons["icons"]:
        found[HELD_OUT] = partial(render_body, icons["icons"][slug]["body"], icons["width"], icons["height"])
    return found


@cache
def read_icons(packages: Path) -> dict:
    """The icon set of the vendor held out."""
    return json.loads((packages / FLUENT / "icons.json").read_text())


def add_credits(folder: Path) -> None:
    """The other vendors' licences, behind OpenMoji's in the folder's ATTRIBUTION.md."""
    with (folder / "ATTRIBUTION.md").open("a") as file:
        file.write(CREDITS)


def slug_of(name: str) -> str:
    """`"O button (blood type)"` -> `"o-button-blood-type"`, as icon sets name their pictures"""
    return re.sub(r"[^a-z0-9]+", "-", re.sub("[’“”]", "", name.lower())).strip("-")


def _png(packages: Path, package: str, thing: Thing) -> Path | None:
    folder = packages / package / "img" / package.rsplit("-", 1)[1] / "64"
    code = thing.code.lower()
    names = (code, code.replace(VARIATION.lower(), ""), code + VARIATION.lower())
    return next((folder / f"{name}.png" for name in names if (folder / f"{name}.png").is_file()), None)


def scaled(path: Path, size: int):
    """A PNG as an RGBA picture of `size` x `size`."""
    from PIL import Image

    return Image.open(path).convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)


def render_body(body: str, width: int, height: int, size: int):
    """The inside of an SVG as an RGBA picture."""
    text = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    return render(text, size)


def write_full(
    packages: Path, out: Path, *, things: int | None = None, views: int = 1, turns: int = 4, seed: int = 0
) -> dict[str, int]:
    """Everything; returns the counts. `views`: training pictures of a thing by each vendor."""
    from tqdm import tqdm

    require_packages()
    require_vendors(packages)
    icons = read_icons(packages)
    chosen = read_full_things(packages)
    if things is not None:
        chosen = sorted(random.Random(seed).sample(chosen, min(things, len(chosen))), key=lambda thing: thing.code)
    rows, captions, held, seen_tests = [], [], [], []
    for number, thing in enumerate(tqdm(chosen, desc="names-full: pictures", unit=" things", mininterval=1)):
        rng = random.Random(f"{seed} {thing.code}")
        for vendor, draw in drawings(packages, thing, icons).items():
            seen: set[bytes] = set()
            for view in range(1 if vendor == HELD_OUT else views + 1):
                split = "test" if view == views or vendor == HELD_OUT else "train"
                image = f"names/{split}/{vendor}/{thing.code}-{view}.png"
                if split == "test" and vendor not in (HELD_OUT, "openmoji"):
                    continue  # one seen vendor is enough to compare with
                save_new(draw, out / "images" / image, rng, seen)
                if split == "train":
                    rows += name_rows(thing, image, turns, rng)
                    captions.append(caption(thing, image))
                else:
                    (held if vendor == HELD_OUT else seen_tests).extend(name_questions(thing, image, number, 4))
    random.Random(seed).shuffle(rows)
    write_attribution(out / "images" / "names")
    add_credits(out / "images" / "names")
    write_rows(out / "names.json", rows)
    write_rows(out / "captions.json", captions)
    write_lines(out / "names_test.jsonl", held)
    write_lines(out / "names_seen_test.jsonl", seen_tests)
    facts = len(chosen) * len(LANGUAGE_NAMES)
    return {"things": len(chosen), "facts": facts, "rows": len(rows), "held_out": len(held), "seen": len(seen_tests)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="a node_modules with the packages (default: fetched with npm)")
    parser.add_argument("--fetch", type=Path, default=Path("build/names-full"), help="where npm puts them")
    parser.add_argument("--out", type=Path, default=Path("runs/names-full/data"))
    parser.add_argument("--things", type=COUNT, help="so many of the emoji, drawn by the seed (all, about 1,580)")
    parser.add_argument("--views", type=COUNT, default=1, help="training pictures of each thing by each vendor (1)")
    parser.add_argument("--turns", type=COUNT, default=4, help="languages asked for in a row (4)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from megatron_moellava.config import MoELlavaError

    try:
        packages = args.packages or fetch(args.fetch)
        options = {"things": args.things, "views": args.views, "turns": args.turns, "seed": args.seed}
        print(f"{args.out}: {write_full(packages, args.out, **options)}")
    except MoELlavaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
