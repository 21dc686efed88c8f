"""Numbers in texts that mean a place, written and read."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moellava.config import BoxFormatName
from megatron_moellava.data.box_formats import FORMATS, kind_of

BOX = np.array([[102.4, 40.6], [874.0, 999.0]])
SIZE = (999, 999)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("thousand", "[102, 41, 874, 999]"),
        ("llava", "[0.1, 0.04, 0.87, 1.0]"),
        ("qwen", "[102, 41, 874, 999]"),
        ("qwen_vl", "(102,41),(874,999)"),
        ("pixels", "[102.4, 40.6, 874.0, 999.0]"),
    ],
)
def test_a_box_is_written_as_its_convention_has_it(name, text):
    assert FORMATS[name].write(BOX, SIZE) == text
    (found,) = FORMATS[name].find(f"It is at {text}, I think.")
    assert found.kind == "box" and f"It is at {text}, I think."[slice(*found.span)] == text
    step = 999 * 0.005 if name == "llava" else 0.5
    assert np.abs(FORMATS[name].read(list(found.numbers), SIZE) - BOX).max() <= step


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["thousand", "qwen", "qwen_vl", "pixels"]),
    st.integers(1, 999),
    st.integers(1, 999),
    st.lists(st.floats(0, 1), min_size=2, max_size=12).filter(lambda numbers: len(numbers) % 2 == 0),
)
def test_text_goes_back_within_half_a_pixel(name, width, height, places):
    """As long as a side has no more pixels than the convention has steps."""
    points = np.array(places).reshape(-1, 2) * (width, height)
    form = FORMATS[name]
    (found,) = form.find(form.write(points, (width, height)))
    assert found.kind == kind_of(found.numbers)
    assert np.abs(form.read(list(found.numbers), (width, height)) - points).max() <= 0.5 + 1e-9


def test_other_numbers_are_no_places():
    thousand = FORMATS["thousand"]
    assert thousand.find("in [2019], [1, 2, 3], [0, 1, 2, 1000] and 12, 13, 14, 15") == []
    assert [found.kind for found in thousand.find("[1, 2] [ 1,2 , 3,4 ] [1, 2, 3, 4, 5, 6]")] == [
        "point",
        "box",
        "polygon",
    ]
    assert FORMATS["llava"].find("[1, 2, 3, 4]") == []


def test_the_configuration_offers_what_a_model_can_be_taught():
    """Every convention but those that only annotations use."""
    assert set(get_args(BoxFormatName)) == {name for name in FORMATS if name not in ("pixels", "upright")}
