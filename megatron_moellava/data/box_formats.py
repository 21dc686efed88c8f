"""How boxes, points and polygons are written as numbers: one record for each convention.

A convention says from which picture's corner it counts, in how many steps, and what stands around the numbers. The same
records read what a data set or a model has written and write what a model is to learn.

  thousand  [102, 41, 873, 999]               0 to 999 over what the tower sees
  llava     [0.1, 0.04, 0.87, 1.0]            0 to 1 over the picture padded to a square, as LLaVA-1.5's mix has it
  qwen      [34, 14, 294, 336]                pixels of the picture that the tower sees, as Qwen2.5-VL
  qwen_vl   (102,41),(873,999)                0 to 999 over the whole picture, as Qwen-VL
  pixels    [12.5, 8, 320, 240]               pixels of the file as it is stored: what annotations hold
  upright   [12.5, 8, 320, 240]               the same after EXIF's turn: what a viewer shows
"""

import functools
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["point", "box", "polygon"]
Frame = Literal["stored", "upright", "padded", "seen"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BoxFormat:
    """One convention. A box is two points, left top and right bottom."""

    name: str
    frame: Frame  # whose left top corner is 0, 0
    steps: int = 0  # its right bottom corner is steps, steps; 0: numbers are its pixels
    decimals: int = 0
    mark: str = "[{}]"  # around all points
    point: str = "{}, {}"
    between: str = ", "  # two points

    def write(self, points_N2: np.ndarray, size: tuple[float, float]) -> str:
        """The text of points in this convention's picture of `size` (width, height)."""
        highest = np.array([self.steps, self.steps] if self.steps else size)
        numbers_N2 = (points_N2 * (highest / np.array(size))).clip(0, highest)
        pairs = [self.point.format(*map(self._number, pair)) for pair in numbers_N2]
        return self.mark.format(self.between.join(pairs))

    def _number(self, value: float) -> str:
        return str(round(float(value), self.decimals)) if self.decimals else str(int(value + 0.5))

    def read(self, numbers: list[float], size: tuple[float, float]) -> np.ndarray:
        """Points [N, 2] in this convention's picture of `size` (width, height)."""
        points_N2 = np.array(numbers, dtype=np.float64).reshape(-1, 2)
        return points_N2 * (np.array(size) / self.steps) if self.steps else points_N2

    def find(self, text: str) -> list["Found"]:
        """All that is written in this convention, in the text's order. Numbers beyond its steps are something else."""
        found = []
        for match in _pattern(self).finditer(text):
            numbers = [float(number) for number in _NUMBER.findall(match.group())]
            if kind := kind_of(numbers):
                fits = not self.steps or max(numbers) <= self.steps
                found += [Found(kind, tuple(numbers), match.span())] if fits else []
        return found


@dataclass(frozen=True, slots=True)
class Found:
    """Numbers in a text that mean a place in a picture."""

    kind: Kind
    numbers: tuple[float, ...]
    span: tuple[int, int]  # of the text


_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@functools.cache
def _pattern(form: BoxFormat) -> re.Pattern[str]:
    number = r"\d+\.\d+|\d+" if form.decimals else r"\d+"
    point = _spaced(form.point).replace(r"\{\}", rf"(?:{number})")
    return re.compile(_spaced(form.mark).replace(r"\{\}", rf"{point}(?:\s*{_spaced(form.between)}\s*{point})*"))


def _spaced(text: str) -> str:
    """A pattern for the text that does not mind blanks around its marks."""
    parts = [re.escape(part) for part in re.findall(r"\{\}|\S", text)]
    return r"\s*".join(parts)


def kind_of(numbers: list[float] | tuple[float, ...]) -> Kind | None:
    """Two numbers are a point, four a box, six and more (an even count) a polygon; others nothing."""
    if len(numbers) % 2 or not numbers:
        return None
    return "point" if len(numbers) == 2 else "box" if len(numbers) == 4 else "polygon"


FORMATS = {
    form.name: form
    for form in (
        BoxFormat(name="thousand", frame="seen", steps=999),
        BoxFormat(name="llava", frame="padded", steps=1, decimals=2),
        BoxFormat(name="qwen", frame="seen"),
        BoxFormat(name="qwen_vl", frame="upright", steps=999, mark="{}", point="({},{})", between=","),
        BoxFormat(name="pixels", frame="stored", decimals=2),
        BoxFormat(name="upright", frame="upright", decimals=2),
    )
}
