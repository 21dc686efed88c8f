"""Where the pictures of a conversation belong."""

import pytest

from megatron_moellava.data.bad_sample import BadSample
from megatron_moellava.data.placeholders import any_of, in_order, in_places, placed, with_placeholders
from megatron_moellava.data.sample import ImageRef
from tests.helpers.modalities import DEPTH, THERMAL


def test_what_is_shown_takes_its_places_or_none():
    assert placed("is <image> in <video>?", ["<image>", "<image><image>"]) == "is <image> in <image><image>?"
    assert placed("is <image>?", ["<image>"] * 2) is None


def test_each_kind_has_its_own_places():
    assert in_places("is <image> in <depth>?", ["<depth>", "<image>"]) == [1, 0]
    assert in_places("<depth> <depth> <image>", ["<depth>", "<image>", "<depth>"]) == [0, 2, 1]
    assert in_places("is <image> in <image>?", ["<depth>", "<image>"]) is None
    assert in_places("is <image> in <video>?", ["<image>"]) is None
    assert in_places("<thermal>", []) == [], "of a kind that nothing is of it is text"
    assert any_of(["<depth>"]).findall("<depth><image><thermal>") == ["<depth>", "<image>"]


def test_pictures_come_in_the_order_of_the_text_and_rows_say_it_as_before():
    names = {"a": None, "b": None, "d": DEPTH, "e": DEPTH, "t": THERMAL}
    pictures = [ImageRef(name=name, modality=modality) for name, modality in names.items()]
    texts = ["<depth> <image>?", "The <thermal>.", "<image> or <depth>?"]
    ordered, plain = in_order(pictures, (DEPTH, THERMAL), texts, "row 1")
    assert [picture.name for picture in ordered] == ["d", "a", "t", "b", "e"]
    assert plain == ["<image> <image>?", "The <image>.", "<image> or <image>?"]
    kinds = [picture.modality.name if picture.modality else "image" for picture in ordered]
    assert with_placeholders(plain, kinds) == texts
    assert with_placeholders(["an <image>"], []) == ["an <image>"]


@pytest.mark.parametrize("texts", [["<depth>"], ["<depth> <depth> <thermal>"], ["<image>"]])
def test_a_place_without_its_picture_is_refused(texts):
    pictures = [ImageRef(name=name, modality=DEPTH) for name in "de"]
    with pytest.raises(BadSample, match=r"row 1: . `<(depth|thermal)>` in the conversation but . in `(depth|thermal)`"):
        in_order(pictures, (DEPTH, THERMAL), texts, "row 1")
