"""Boxes, points and polygons of a row, and how they follow its pictures.

A row gives them as numbers beside the text, which says with `<box>`, `<point>` or `<polygon>` where each belongs:

  {"image": "a.jpg", "boxes": [[12, 8, 320, 240]], "conversations": [
    {"from": "human", "value": "<image>\\nWhere is the cat?"}, {"from": "gpt", "value": "At <box>."}]}

Numbers are pixels of the stored file unless `box_format` says otherwise. With `box_format` alone the numbers stand in the
text, as in LLaVA's mix. Either way they are carried into what the tower sees, and written as `data.box_format` says.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_moellava.data.bad_sample import BadSample
from megatron_moellava.data.box_formats import FORMATS, BoxFormat, Kind, kind_of
from megatron_moellava.data.geometry import Map, padded

FIELDS: dict[str, Kind] = {"boxes": "box", "points": "point", "polygons": "polygon"}  # of a row -> its placeholder
REGION_KEYS = (*FIELDS, "box_format")
PLACEHOLDER = re.compile(r"<(box|point|polygon)>")
OUTSIDE = 0.5  # pixels that an annotation may reach over the edge without a note: rounding
NOTHING = 1e-6  # pixels: what rounding may leave of a box that is wholly cut away
CUT = "box cut at the picture's edge"


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """A place in one of a sample's pictures, in the numbers of the row."""

    kind: Kind
    numbers: tuple[float, ...]  # x and y in turn
    image: int = 0  # which picture


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """How a picture looks in the file and to the tower."""

    stored: Map  # from the file's pixels to the upright picture
    seen: Map  # from the upright picture to what the tower sees

    def frame(self, form: BoxFormat) -> tuple[tuple[float, float], Callable, Callable]:
        """(size of the picture that `form` counts in, from upright into it, from it to upright)"""
        width, height = self.stored.size
        if form.frame == "stored":
            size = (height, width) if self.stored.swapped else (width, height)
            return size, self.stored.back, self.stored
        step = {
            "upright": Map(size=self.stored.size),
            "padded": padded(int(width), int(height)),
            "seen": self.seen,
        }[form.frame]
        return step.size, step, step.back


def to_upright(numbers: Sequence[float], form: BoxFormat, view: View) -> np.ndarray:
    """Points [N, 2] in pixels of the upright picture."""
    size, _, back = view.frame(form)
    return corners(back(form.read(list(numbers), size)))


def corners(points_N2: np.ndarray) -> np.ndarray:
    """Two points as left top and right bottom: a turn exchanges the corners of a box."""
    return np.stack([points_N2.min(axis=0), points_N2.max(axis=0)]) if len(points_N2) == 2 else points_N2


def written(region: Region, source: BoxFormat, target: BoxFormat, view: View, origin: str) -> tuple[str, list[str]]:
    """(the region's text in the target's convention, notes). Raises BadSample where nothing of it can be seen."""
    upright_N2 = to_upright(region.numbers, source, view)
    size = np.array(view.stored.size)
    over = max(float((-upright_N2).max()), float((upright_N2 - size).max()))
    window = np.array([[0.0, 0.0], view.seen.size])
    lowest, highest = corners(view.seen.back(window))
    visible = upright_N2.clip(np.maximum(lowest, 0), np.minimum(highest, size))
    extent, was = np.ptp(visible, axis=0), np.ptp(upright_N2, axis=0)
    gone = (extent[was > 0] < NOTHING).any() or (region.kind == "point" and not np.allclose(visible, upright_N2))
    if gone:
        raise BadSample(
            "box out of sight",
            f"{origin}: nothing of the {region.kind} {list(region.numbers)} can be seen in picture {region.image} "
            f"({size[0]:g} x {size[1]:g}); correct it, or show the whole picture with data.image_aspect_ratio=pad",
        )
    frame, forth, _ = view.frame(target)
    cut = over > OUTSIDE or not np.allclose(visible, upright_N2.clip(0, size))
    return target.write(corners(forth(visible)), frame), [CUT] if cut else []


def rewrite(
    texts: Sequence[str], regions: Sequence[Region], source: str, target: str, views: Sequence[View], origin: str
) -> tuple[list[str], list[str]]:
    """(texts with the numbers in place of their placeholders, notes). Raises BadSample."""
    waiting, notes = iter(regions), []
    kinds = {region.kind for region in regions}

    def number(match: re.Match) -> str:
        if match.group(1) not in kinds:
            return match.group()
        region = next(waiting)
        text, odd = written(region, FORMATS[source], FORMATS[target], views[region.image], origin)
        notes.extend(odd)
        return text

    return [PLACEHOLDER.sub(number, text) for text in texts], notes


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """A place that an answer names, in pixels of the upright picture."""

    kind: Kind
    points: tuple[tuple[float, float], ...]  # of a box: left top, right bottom
    image: int  # which picture
    span: tuple[int, int]  # of the answer

    def data(self) -> dict:
        """JSON: {"kind", "points", "image", "start", "end"}; a tenth of a pixel is finer than any convention."""
        points = [[round(x, 1), round(y, 1)] for x, y in self.points]
        return {"kind": self.kind, "points": points, "image": self.image, "start": self.span[0], "end": self.span[1]}


def locate(answer: str, form: str, views: Sequence[View]) -> list[Located]:
    """All places that an answer names; they lie in the picture that was shown last. Nothing without a picture."""
    if not views:
        return []
    image, view, located = len(views) - 1, views[-1], []
    for found in FORMATS[form].find(answer):
        points_N2 = to_upright(found.numbers, FORMATS[form], view).clip(0, view.stored.size)
        points = tuple((float(x), float(y)) for x, y in points_N2)
        located.append(Located(kind=found.kind, points=points, image=image, span=found.span))
    return located


def stand_in(text: str, regions: Sequence[Region]) -> str:
    """The text with numbers as long as usual in place of the regions."""
    kinds = {region.kind for region in regions}
    numbers = {"point": "[500, 500]", "box": "[500, 500, 500, 500]", "polygon": f"[{', '.join(['500'] * 24)}]"}
    return PLACEHOLDER.sub(lambda match: numbers[match[1]] if match[1] in kinds else match[0], text)


# --- reading a row ----------------------------------------------------------------------------------------------------


def parse_regions(record: dict, texts: list[str], num_images: int, origin: str) -> tuple[tuple[Region, ...], list[str]]:
    """(regions in the texts' order, texts). Without any of the fields `<box>` is text. Raises BadSample."""
    given = {kind: _region_list(record.get(field), field, origin) for field, kind in FIELDS.items()}
    form = record.get("box_format")
    if form is not None and form not in FORMATS:
        raise BadSample("malformed box", f"{origin}: box_format={form!r} is unknown; use one of {', '.join(FORMATS)}")
    if form is not None and not any(given.values()):
        given, texts = _in_text(texts, FORMATS[form], origin)
    kinds = [kind for kind, regions in given.items() if regions]
    placed = [match for text in texts for match in PLACEHOLDER.findall(text) if match in kinds]
    for field, kind in FIELDS.items():
        if kind in kinds and placed.count(kind) != len(given[kind]):
            raise BadSample(
                "box count",
                f"{origin}: {placed.count(kind)} `<{kind}>` in the conversation but {len(given[kind])} in `{field}`; write one "
                "for each, in order",
            )
    waiting = {kind: iter(regions) for kind, regions in given.items()}
    regions = tuple(next(waiting[kind]) for kind in placed)
    if lost := [region for region in regions if region.image >= num_images]:
        raise BadSample(
            "box count",
            f"{origin}: a {lost[0].kind} lies in picture {lost[0].image}, but there are {num_images} (from 0)",
        )
    return regions, texts


def region_fields(regions: Sequence[Region], form: str) -> dict:
    """The fields of a row from which `parse_regions` reads these again."""
    fields: dict = {}
    for field, kind in FIELDS.items():
        entries = [{"at": list(region.numbers), "image": region.image} for region in regions if region.kind == kind]
        fields |= {field: entries} if entries else {}
    return fields | ({"box_format": form} if fields else {})


def _in_text(texts: list[str], form: BoxFormat, origin: str) -> tuple[dict[Kind, list[Region]], list[str]]:
    """Numbers in the text become regions of the first picture, and placeholders."""
    given: dict[Kind, list[Region]] = {kind: [] for kind in FIELDS.values()}
    new = []
    for text in texts:
        if PLACEHOLDER.search(text):
            raise BadSample(
                "box count",
                f"{origin}: has `{PLACEHOLDER.search(text).group()}` and box_format, but no numbers for it",  # type: ignore[union-attr]
            )
        parts, end = [], 0
        for found in form.find(text):
            given[found.kind].append(Region(kind=found.kind, numbers=found.numbers))
            parts += [text[end : found.span[0]], f"<{found.kind}>"]
            end = found.span[1]
        new.append("".join([*parts, text[end:]]))
    return given, new


def _region_list(value: object, field: str, origin: str) -> list[Region]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadSample("malformed box", f"{origin}: `{field}` must be a list, found {type(value).__name__}")
    return [_region(entry, field, origin) for entry in value]


def _region(entry: object, field: str, origin: str) -> Region:
    """Of numbers, or of {"at": numbers, "image": which picture}."""
    numbers, image = (entry.get("at"), entry.get("image", 0)) if isinstance(entry, dict) else (entry, 0)
    kind = FIELDS[field]
    good = (
        isinstance(numbers, list)
        and all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
        and kind_of(numbers) == kind
        and bool(np.isfinite(numbers).all())
        and isinstance(image, int)
        and image >= 0
    )
    if not good:
        count = {"point": "[x, y]", "box": "[left, top, right, bottom]", "polygon": "[x, y, x, y, x, y, ...]"}[kind]
        raise BadSample(
            "malformed box",
            f"{origin}: `{field}` holds {entry!r:.80}; each must be {count}, or {{'at': {count}, 'image': 0}}",
        )
    assert isinstance(numbers, list) and isinstance(image, int)
    if kind == "box" and not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
        raise BadSample(
            "malformed box",
            f"{origin}: the box {numbers} has no area; give [left, top, right, bottom] with left < right",
        )
    return Region(kind=kind, numbers=tuple(map(float, numbers)), image=image)
