"""Where the bytes of an image come from."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megatron_moellava.config import DataConfig
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.data.media import encoded as media_encoded
from megatron_moellava.data.media import frame_texts, num_tiles, open_ref, plans, show_video, source, tiles
from megatron_moellava.data.sample import BadSample, ImageRef, parse_record
from megatron_moellava.data.shards import make_shards
from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.towers import get_tower
from tests.helpers.data_files import (
    ASSETS,
    TOWER,
    config,
    conversation,
    encoder,
    make_loader,
    take,
    write_images,
    write_rows,
)
from tests.helpers.modalities import DEPTH
from tests.helpers.videos import number_of, write_video


def encoded(color=(10, 20, 30), size=(40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "png")
    return buffer.getvalue()


def test_bytes_come_from_a_tar_member_from_base64_or_from_a_file(tmp_path):
    write_images(tmp_path)
    data = encoded()
    assert source(ImageRef(name="x", data=data), "", "row 1") == data
    assert source(ImageRef(name="data:image/png;base64," + base64.b64encode(data).decode()), "", "row 1") == data
    assert source(ImageRef(name="a.png"), str(tmp_path), "row 1").endswith("a.png")
    with pytest.raises(BadSample, match="broken base64 image"):
        source(ImageRef(name="data:image/png;base64,@@@"), "", "row 1")


def test_frames_are_taken_from_the_middle_of_their_share(tmp_path):
    """Two of six frames: the second and the fifth."""
    colors = [(number * 40, 0, 0) for number in range(6)]
    frames = [Image.new("RGB", (8, 8), color) for color in colors]
    frames[0].save(tmp_path / "video.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "folder").mkdir()
    for number, frame in enumerate(frames, start=8):  # by name, 10 would come before 8
        frame.save(tmp_path / f"folder/frame_{number}.png")
    for name in ("video.gif", "folder"):
        seen = [
            open_ref(ImageRef(name=name, frame=(index, 2)), str(tmp_path), "row 1")[0].getpixel((0, 0))[0]
            for index in range(2)
        ]
        assert np.allclose(seen, [1 * 40, 4 * 40], atol=4), name


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.mp4", "no such video"), ("empty", "holds no frames"), ("text.gif", "cannot be decoded")],
)
def test_a_video_that_is_none_is_named(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gif").write_text("no picture")
    with pytest.raises(BadSample, match=f"row 1, video .*: .*{message}"):
        open_ref(ImageRef(name=name, frame=(0, 1)), str(tmp_path), "row 1")


def test_the_number_of_tiles_is_that_of_the_tiles():
    for size in ((40, 30), (90, 30), (30, 90)):
        ref = ImageRef(name="x", data=encoded(size=size))
        for grid in (False, True):
            data = config(image_grid=grid)
            pixels, notes = tiles(ref, "", "row 1", TOWER, data)
            assert len(pixels) == num_tiles(ref, "", "row 1", TOWER, data) == (len(pixels) if grid else 1)
            assert pixels.shape[1:] == (3, TOWER.image_size, TOWER.image_size) and notes == ()


def test_a_videos_frames_follow_the_settings_in_training(tmp_path):
    """4 s at 10 per second: two a second are 8 frames, cut to a budget of 4 they stand a second apart."""
    write_video(tmp_path / "v.mp4")
    data = config(tmp_path / "x.json", video_fps=2.0, video_frames=4, video_times="seconds")
    texts = frame_texts("v.mp4", str(tmp_path), "row 1", data)
    assert texts == [f"{second + 0.5:.1f} s: <image>\n" for second in range(4)]
    assert frame_texts("missing.mp4", str(tmp_path), "row 1", config(tmp_path / "x.json")) == ["<image>"] * 8
    text, frames = show_video(str(tmp_path / "v.mp4"), "row 1", data)
    assert text == "".join(texts) and [number_of(frame) for frame in frames] == [5, 15, 25, 35]
    _, part = show_video(str(tmp_path / "v.mp4"), "row 1", data, span=(1.0, 2.0))
    assert [number_of(frame) for frame in part] == [12, 17]


@pytest.mark.parametrize("workers", [0, 2])
def test_videos_are_trained_on_and_a_broken_one_is_a_named_bad_sample(tmp_path, workers):
    write_video(tmp_path / "v.mp4")
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "v.mp4").read_bytes()[:900])
    rows = [
        {"id": name, "video": f"{name}.mp4", "conversations": conversation("<video>\nWhat?", "grey", "Sure?", "yes")}
        for name in ("v", "broken")
    ]
    settings = {"video_fps": 1.0, "video_times": "seconds", "max_skip_share": 0.5, "num_workers": workers}
    path = write_rows(tmp_path, rows)
    loader = make_loader(config(path, packing=False, **settings), micro_batch_size=1)
    (batch,) = take(loader, 1)
    assert len(batch.pixel_values_NCHW) == 4 and batch.sample_ids == ["v"]
    take(loader, 1)
    assert loader.skipped == {"unreadable video": loader.skipped.total()} and loader.skipped.total() >= 1
    loader.close()
    make_shards(path, tmp_path, tmp_path / "shards", video_fps=1.0, video_times="seconds", max_skip_share=0.5)
    (from_shards,) = take(make_loader(config(tmp_path / "shards", packing=False, **settings), micro_batch_size=1), 1)
    assert (from_shards.tokens_BS == batch.tokens_BS).all()
    assert (from_shards.pixel_values_NCHW == batch.pixel_values_NCHW).all()


def test_pooled_frames_are_the_same_from_shards(tmp_path):
    """Five frames in pairs: 4 visual tokens for each of three groups, which share a time."""
    write_video(tmp_path / "v.mp4")
    row = {"id": "v", "video": "v.mp4", "conversations": conversation("<video>\nWhat?", "grey")}
    path = write_rows(tmp_path, [row])
    settings = {"video_frames": 5, "video_times": "seconds", "video_pooling": "2x2x2"}
    make_shards(path, tmp_path, tmp_path / "shards", **settings)
    for source_ in (path, tmp_path / "shards"):
        loader = make_loader(config(source_, packing=False, **settings), micro_batch_size=1)
        (batch,) = take(loader, 1)
        assert batch.pools == ((2, 2), (2, 2), (1, 2)) and batch.counts.image_rows == 12, source_
        decode = loader.micro_batches.pipeline.encoder.tokenizer.decode
        assert "0.4 s: \n2.0 s: \n3.6 s: \n\nWhat?" in decode(
            [int(token) for token in batch.tokens_BS[0] if token >= 0]
        )


def test_the_seconds_are_what_the_model_reads(tmp_path):
    write_video(tmp_path / "v.mp4")
    row = {"id": "v", "video": "v.mp4", "conversations": conversation("<video>\nWhat?", "grey")}
    loader = make_loader(
        config(write_rows(tmp_path, [row]), packing=False, video_frames=2, video_times="seconds"), micro_batch_size=1
    )
    (batch,) = take(loader, 1)
    decode = loader.micro_batches.pipeline.encoder.tokenizer.decode
    assert "1.0 s: \n3.0 s: \n\nWhat?" in decode([int(token) for token in batch.tokens_BS[0] if token >= 0])


WHOLE = "languagebind-video-tiny attends across the 4 frames of a video"


@pytest.mark.parametrize(
    ("record", "longest", "message"),
    [
        ({"video": ["film", "film"]}, 128, ""),
        ({"image": "a.png"}, 128, f"row 3: shows a picture, and {WHOLE}; name videos in `video`"),
        ({"image": ["a.png"] * 3, "frames": [3]}, 128, f"row 3: shows 3 frames of a video, and {WHOLE}"),
        ({"image": ["a.png"] * 4, "frames": [4]}, 128, ""),
        ({"video": ["film", "film"]}, 80, "the cut would go through one, which the tower takes whole"),
    ],
)
def test_a_tower_for_videos_gets_whole_ones_or_the_row_is_named(record, longest, message):
    """Sixteen visual tokens a video, in a row that may be cut behind its first answer."""
    tokenizer, data = load_tokenizer(ASSETS / "tok_bpe"), DataConfig(video_frames=4)
    marks = {"video": "<video>", "image": "<image>" * record.get("frames", [1])[0]}
    mark = marks[next(iter(record))]
    turns = conversation(f"{mark} what", "a", f"{mark if record.get('video') else ''} so", "b")
    sample = parse_record({"conversations": turns} | record, origin="row 3", frames=lambda name: ["<image>"] * 4)
    arguments = encoder(tokenizer, num_features=4, max_length=longest, template=get_template("v1")), sample
    if message:
        with pytest.raises(BadSample, match=re.escape(message)):
            media_encoded(*arguments, "", "row 3", get_tower("languagebind-video-tiny"), data)
    else:
        found = media_encoded(*arguments, "", "row 3", get_tower("languagebind-video-tiny"), data)
        assert len(found.images) % 4 == 0 and (found.tokens_S == IMAGE_TOKEN).sum() == 4 * len(found.images)


@pytest.mark.parametrize("key", ["image", "depth", "video"])
def test_what_is_wrong_with_a_file_is_said_of_the_rows_own_key(tmp_path, key):
    """Missing when it is opened and when its size is read, outside the folder, on the web, broken."""
    more = {"depth": {"modality": DEPTH}, "video": {"frame": (0, 8)}}.get(key, {})
    tower, data = get_tower("siglip-tiny@newline"), DataConfig(image_grid=True)
    gone, where = ImageRef(name="gone.png", **more), "row 1"
    said = []
    for call in (
        lambda: open_ref(gone, str(tmp_path), where),
        lambda: plans([gone], str(tmp_path), where, tower, data),
        lambda: source(replace(gone, name="../x.png"), str(tmp_path), where),
        lambda: source(replace(gone, name="https://a/x.png"), str(tmp_path), where),
        lambda: source(replace(gone, name="data:image/png;base64,@@@"), str(tmp_path), where),
    ):
        try:
            call()
        except BadSample as error:
            said.append(str(error))
    assert len(said) == (4 if key == "video" else 5), "of a video no size is read"
    for text in said:
        assert key in text and all(other not in text for other in {"`image`", "`depth`", "`video`"} - {f"`{key}`"})
    assert f"check image_folder and the row's `{key}`" in said[0] and f"row 1, {key} 'gone.png'" in said[0]
