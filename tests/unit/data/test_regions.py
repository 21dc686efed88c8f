"""Boxes of a row on their way into its text."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_moellava.data import geometry, images, media
from megatron_moellava.data.box_formats import FORMATS
from megatron_moellava.data.plan import Plan
from megatron_moellava.data.regions import (
    CUT,
    Region,
    View,
    parse_regions,
    region_fields,
    rewrite,
    stand_in,
    to_upright,
)
from megatron_moellava.data.sample import BadSample, parse_record
from megatron_moellava.data.shards import make_shards
from tests.helpers.data_files import TOWER, config, conversation, make_loader, take, write_rows

BIG = SimpleNamespace(image_size=336, resize="shortest_edge")  # whose crops of 400 x 300 are whole pixels


def record(question="<image>\nwhere?", answer="at <box>.", **fields) -> dict:
    return {"image": "a.png", "conversations": conversation(question, answer)} | fields


def view_of(width=400, height=300, orientation=1, aspect="pad", tower=TOWER) -> View:
    stored = geometry.upright((width, height), orientation)
    return View(stored=stored, seen=geometry.seen(*map(int, stored.size), tower, aspect_ratio=aspect))


def text_of(row: dict, view: View, target: str = "thousand") -> str:
    sample = parse_record(row, origin="row 1")
    texts, _ = rewrite([turn.text for turn in sample.turns], sample.regions, sample.box_format, target, [view], "row 1")
    return texts[1]


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("thousand", "at [250, 125, 500, 500]."),  # the picture of 400 x 300 lies 50 below the square's edge
        ("llava", "at [0.25, 0.12, 0.5, 0.5]."),
        ("qwen", "at [7, 4, 14, 14]."),  # of 28 pixels
        ("qwen_vl", "at (250,0),(500,500)."),
    ],
)
def test_a_box_of_the_file_is_told_as_the_tower_sees_it(target, text):
    assert text_of(record(boxes=[[100, 0, 200, 150]]), view_of(), target) == text


def test_numbers_in_the_text_are_carried_over_too():
    """LLaVA's mix counts from 0 to 1 over the padded square."""
    row = record(answer="at [0.25, 0.125, 0.5, 0.5].", box_format="llava")
    assert text_of(row, view_of(), "thousand") == "at [250, 125, 500, 500]."
    assert text_of(row, view_of(), "qwen_vl") == "at (250,0),(500,500)."
    # A crop shows less: 300 x 300 from the middle, so that the box begins at 50 of it.
    assert text_of(row, view_of(aspect="square", tower=BIG), "thousand") == "at [167, 0, 500, 500]."


def test_a_turned_picture_has_turned_boxes():
    """Stored 400 x 300 with a quarter turn: what lay at the left lies on top."""
    assert text_of(record(boxes=[[0, 0, 100, 300]]), view_of(orientation=6), "qwen_vl") == "at (0,0),(999,250)."
    seen = record(boxes=[[0, 0, 300, 100]], box_format="upright")
    assert text_of(seen, view_of(orientation=6), "qwen_vl") == "at (0,0),(999,250)."


@settings(max_examples=80, deadline=None)
@given(
    st.integers(8, 999),
    st.integers(8, 999),
    st.integers(1, 8),
    st.sampled_from(["thousand", "qwen_vl"]),
    st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda p: abs(p[0] - p[2]) > 0.01 < abs(p[1] - p[3])),
)
def test_a_box_written_and_read_again_is_within_half_a_pixel(width, height, orientation, target, place):
    """Through EXIF's turn, the pad and the resize, as long as the longer side has no more pixels than there are steps."""
    left, right = sorted((place[0] * width, place[2] * width))
    top, bottom = sorted((place[1] * height, place[3] * height))
    view = view_of(width, height, orientation)
    text = text_of(record(boxes=[[left, top, right, bottom]]), view, target)
    (found,) = FORMATS[target].find(text)
    back = view.stored.back(to_upright(found.numbers, FORMATS[target], view))
    assert np.abs(np.sort(back, axis=0) - [[left, top], [right, bottom]]).max() <= 0.5 + 1e-6


def test_points_polygons_and_several_pictures():
    row = record(
        "<image><image>\nwhere?",
        "<point>, <box>, <polygon>",
        image=["a.png", "b.png"],
        points=[[200, 150]],
        boxes=[{"at": [0, 0, 50, 100], "image": 1}],
        polygons=[[0, 0, 400, 0, 200, 300]],
    )
    sample = parse_record(row, origin="row 1")
    assert [(region.kind, region.image) for region in sample.regions] == [("point", 0), ("box", 1), ("polygon", 0)]
    views = [view_of(), view_of(100, 100)]
    texts, notes = rewrite([turn.text for turn in sample.turns], sample.regions, "pixels", "qwen_vl", views, "row 1")
    assert texts[1] == "(500,500), (0,0),(500,999), (0,0),(999,0),(500,999)" and notes == []


def test_what_the_crop_leaves_is_told_and_noted_and_what_it_hides_is_refused():
    cropped = view_of(aspect="square", tower=BIG)  # of 400 x 300, x from 50 to 350 is seen
    regions = (Region(kind="box", numbers=(0, 0, 200, 150)),)
    assert rewrite(["<box>"], regions, "pixels", "thousand", [cropped], "row 1") == (["[0, 0, 500, 500]"], [CUT])
    hidden = (Region(kind="box", numbers=(0, 0, 50, 150)),)
    with pytest.raises(BadSample, match=r"row 1: nothing of the box .* can be seen.*image_aspect_ratio=pad"):
        rewrite(["<box>"], hidden, "pixels", "thousand", [cropped], "row 1")
    beyond = (Region(kind="box", numbers=(390, 0, 410, 300)),)
    assert rewrite(["<box>"], beyond, "pixels", "qwen_vl", [view_of()], "row 1") == (["(974,0),(999,999)"], [CUT])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"boxes": [[1, 2, 3]]}, r"`boxes` holds \[1, 2, 3\]; each must be \[left, top"),
        ({"boxes": [[3, 2, 1, 4]]}, "has no area"),
        ({"boxes": [[0, 0, 1, float("nan")]]}, "`boxes` holds"),
        ({"boxes": "1, 2, 3, 4"}, "must be a list"),
        ({"boxes": [[1, 2, 3, 4], [1, 2, 3, 4]]}, "1 `<box>` in the conversation but 2 in `boxes`"),
        ({"boxes": [{"at": [1, 2, 3, 4], "image": 1}]}, r"lies in picture 1, but there are 1"),
        ({"boxes": [[1, 2, 3, 4]], "box_format": "coco"}, "box_format='coco' is unknown; use one of thousand"),
        ({"box_format": "thousand"}, "has `<box>` and box_format, but no numbers"),
        ({"points": [[1, 2]]}, "0 `<point>` in the conversation but 1 in `points`"),
    ],
)
def test_boxes_that_are_none_are_named(fields, message):
    with pytest.raises(BadSample, match=rf"row 1: .*{message}|row 1: .*{message}"):
        parse_record(record(**fields), origin="row 1")


def test_without_boxes_the_word_is_text():
    sample = parse_record(record(answer="write <box> in HTML"), origin="row 1")
    assert sample.regions == () and sample.turns[1].text == "write <box> in HTML"


def test_a_row_of_its_fields_is_the_same_again():
    regions, _ = parse_regions({"boxes": [[1, 2, 3, 4]], "points": [[5, 6]]}, ["<point> <box>"], 1, "row 1")
    assert parse_regions(region_fields(regions, "pixels"), ["<point> <box>"], 1, "row 1")[0] == regions
    assert region_fields((), "pixels") == {}


def test_stand_ins_replace_regions_alone():
    regions = (Region(kind="box", numbers=(1, 2, 3, 4)),)
    assert stand_in("<box> <point>", regions) == "[500, 500, 500, 500] <point>" and stand_in("<box>", ()) == "<box>"


def turned_picture(path, orientation=6) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path, exif=exif)


def test_training_reads_what_the_tower_sees_from_json_and_from_shards(tmp_path):
    turned_picture(tmp_path / "a.png")  # 40 x 30 stored, 30 x 40 seen, 5 pixels from the square's edges
    rows = [record(id=str(n), boxes=[[0, 0, 20, 30]]) for n in range(4)]
    path = write_rows(tmp_path, rows)
    make_shards(path, tmp_path, tmp_path / "shards", workers=1)
    for source in (path, tmp_path / "shards"):
        loader = make_loader(config(source, seq_length=128))
        (batch,) = take(loader, 1)
        text = loader.micro_batches.pipeline.encoder.tokenizer.decode(
            [int(token) for token in batch.labels_BS.flatten() if token >= 0]
        )
        assert "at [125, 0, 874, 500]." in text, source
        assert loader.notes["EXIF rotation applied"] > 0


def test_a_row_out_of_sight_is_a_bad_sample_of_the_run(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "png")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    rows = [record(boxes=[[50, 0, 60, 10]], id="bad"), *(record(boxes=[[0, 0, 9, 9]], id=str(n)) for n in range(9))]
    loader = make_loader(config(write_rows(tmp_path, rows), max_skip_share=0.2))
    take(loader, 8)
    assert loader.skipped["box out of sight"] >= 1


def test_the_format_is_part_of_the_order_that_a_resume_compares(tmp_path):
    turned_picture(tmp_path / "a.png")
    path = write_rows(tmp_path, [record(id=str(n), boxes=[[0, 0, 20, 30]]) for n in range(4)])
    known = make_loader(config(path)).state_dict()["fingerprint"]
    assert "box_format" not in known  # older checkpoints go on
    other = make_loader(config(path, box_format="qwen"))
    saved = json.loads(json.dumps(other.state_dict()))
    with pytest.raises(Exception, match="box_format: 'qwen' then, None now"):
        make_loader(config(path)).load_state_dict(saved)


def test_views_come_from_the_header_and_the_towers_way(tmp_path):
    turned_picture(tmp_path / "a.png")
    stored = images.upright(str(tmp_path / "a.png"), "row 1")
    view = media.view(stored, TOWER, config(tmp_path / "x.json", image_grid=True))
    assert view.stored.size == (30, 40) and view.seen.size == (28, 28) and view.seen.scale == (28 / 30, 28 / 40)
    native = SimpleNamespace(patch_size=14, native=True)
    wide = media.view(stored, native, config(tmp_path / "x.json"), Plan(tokens=12, grid=(4, 3)))
    assert wide.seen.size == (42, 56) and np.allclose(wide.seen(np.array([[30.0, 40.0]])), [[42, 56]])
