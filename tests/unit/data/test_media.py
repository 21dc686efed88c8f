"""Where the bytes of an image come from."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from megatron_moellava.data.media import locate, num_tiles, open_ref, source, tiles
from megatron_moellava.data.sample import BadSample, ImageRef
from tests.helpers.data_files import TOWER, config, write_images


def encoded(color=(10, 20, 30), size=(40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "png")
    return buffer.getvalue()


def test_a_name_leads_to_a_file_below_the_folder_only(tmp_path):
    write_images(tmp_path / "images")
    assert locate(str(tmp_path / "images"), "a.png", "row 1") == str((tmp_path / "images/a.png").resolve())
    for name in ("../secret.png", "/etc/passwd", "sub/../../secret.png"):
        with pytest.raises(BadSample, match=r"row 1: image .* leads outside image_folder"):
            locate(str(tmp_path / "images"), name, "row 1")
    with pytest.raises(BadSample, match="zero byte"):
        locate(str(tmp_path), "a\0.png", "row 1")


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
    with pytest.raises(BadSample, match=f"row 1: .*{message}"):
        open_ref(ImageRef(name=name, frame=(0, 1)), str(tmp_path), "row 1")


def test_the_number_of_tiles_is_that_of_the_tiles():
    for size in ((40, 30), (90, 30), (30, 90)):
        ref = ImageRef(name="x", data=encoded(size=size))
        for grid in (False, True):
            data = config(image_grid=grid)
            pixels, notes = tiles(ref, "", "row 1", TOWER, data)
            assert len(pixels) == num_tiles(ref, "", "row 1", TOWER, data) == (len(pixels) if grid else 1)
            assert pixels.shape[1:] == (3, TOWER.image_size, TOWER.image_size) and notes == ()
