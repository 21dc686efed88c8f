"""Frames of videos are the ones that were asked for, whatever holds them; what is no video is named."""

import struct

import pytest

from megatron_moellava.config import DataConfig
from megatron_moellava.data.bad_sample import BadSample
from megatron_moellava.data.video import AHEAD, Clip, open_video
from tests.helpers.videos import number_of, still, video_bytes, write_video

pytest.importorskip("av")
KINDS = {"mp4": "mpeg4", "mkv": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4", "ts": "mpeg2video"}

SIDES = (60_000, 60_000)  # pixels, more than any picture may have


@pytest.mark.parametrize("kind", KINDS)
def test_any_frame_of_any_container_is_found_in_any_order(tmp_path, kind):
    path = str(write_video(tmp_path / f"v.{kind}", codec=KINDS[kind], rate=25 if kind == "ts" else 10))
    video = open_video(path, "row 1")
    assert abs(video.clip.frames - 40) <= 1 and video.clip.rate == (25 if kind == "ts" else 10)
    for number in (0, 3, 4, 4, 37, 20, 38, 2):
        assert number_of(video.frame(number)[0]) == number


def test_frames_far_apart_are_sought_not_decoded(tmp_path):
    """Of 240 frames with a key frame every 12, the last one costs at most 12 frames' decoding."""
    video = open_video(str(write_video(tmp_path / "v.mp4", frames=51 + AHEAD, key_every=12)), "row 1")
    decoded = 0
    seek = video._rewind

    def counted(number):
        seek(number)
        frames = video.decoded

        def counting():
            nonlocal decoded
            for frame in frames:
                decoded += 1
                yield frame

        video.decoded = counting()

    video._rewind = counted
    video.frame(AHEAD + 50)
    assert 0 < decoded <= 12


def test_a_video_in_memory_is_the_same(tmp_path):
    video = open_video(video_bytes(frames=20), "row 1")
    assert number_of(video.frame(13)[0]) == 13


def test_frames_are_chosen_by_count_or_by_rate_within_a_budget():
    clip = Clip(frames=300, rate=30.0)
    assert clip.seconds == 10
    assert [clip.pick(i, 4) for i in range(4)] == [37, 112, 187, 262] and clip.time(1, 4) == pytest.approx(112 / 30)
    assert clip.num_frames(DataConfig()) == 8  # by count, however short
    for most, fps, count in ((64, 2.0, 20), (8, 2.0, 8), (8, 0.01, 1)):
        assert clip.num_frames(DataConfig(video_frames=most, video_fps=fps)) == count
    assert Clip(frames=3, rate=1).pick(7, 8) == 2


def test_a_part_is_cut_into_shares_of_its_own():
    part = Clip(frames=300, rate=30.0).cut(2, 4)
    assert part.seconds == 2 and [part.pick(i, 2) for i in range(2)] == [75, 105] and part.time(0, 2) == 2.5
    assert Clip(frames=30, rate=30.0).cut(5, 9).pick(0, 1) == 29  # beyond the end: its last frame


def test_frames_say_when_they_are():
    clip = Clip(frames=40, rate=10.0)
    assert clip.texts(DataConfig(video_frames=2)) == ["<image>", "<image>"]
    assert clip.texts(DataConfig(video_frames=2, video_times="seconds")) == ["1.0 s: <image>\n", "3.0 s: <image>\n"]


def test_animations_and_folders_have_times_too(tmp_path):
    frames = [still(number) for number in range(6)]
    frames[0].save(tmp_path / "v.gif", save_all=True, append_images=frames[1:], duration=200)
    (tmp_path / "folder").mkdir()
    for number, frame in enumerate(frames):
        frame.save(tmp_path / f"folder/{number}.png")
    for name, rate in (("v.gif", 5), ("folder", 1)):
        video = open_video(str(tmp_path / name), "row 1")
        assert (video.clip.frames, video.clip.rate) == (6, rate)
        assert [number_of(video.frame(number)[0]) for number in (4, 1, 5)] == [4, 1, 5]
        assert video.frame(0)[1] in ((), ("palette colours converted",))


def test_a_telephones_turn_is_applied():
    """The matrix of the track's header asks for a quarter turn clockwise."""
    data = bytearray(video_bytes(frames=3))
    start = data.index(b"tkhd") + 4 + 40
    data[start : start + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    assert open_video(bytes(data), "row 1").frame(0)[0].size == (48, 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nothing", "cannot be decoded"),
        (b"\0\0\0\x18ftypmp42" + b"\0" * 500, "cannot be decoded"),
        (
            b"GIF89a" + struct.pack("<2H3Bc4HB", *SIDES, 0, 0, 0, b",", 0, 0, *SIDES, 0) + b"\2\1\4\0;",  # of one frame
            "60000 x 60000 pixels",
        ),
        (b"#EXTM3U\n/etc/passwd\n", "cannot be decoded"),  # a playlist that ffmpeg would follow
        (None, "no such video"),
    ],
)
def test_what_is_no_video_is_a_named_bad_sample(tmp_path, content, message):
    path = tmp_path / "v.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadSample, match=f"row 1: .*{message}") as caught:
        open_video(str(path), "row 1")
    assert caught.value.reason in ("unreadable video", "missing image", "decompression bomb")


def test_a_video_that_ends_early_is_named(tmp_path):
    whole = video_bytes(frames=40, kind="mkv", codec="libx264")
    path = tmp_path / "v.mkv"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    video = open_video(str(path), "row 1")
    assert number_of(video.frame(1)[0]) == 1
    with pytest.raises(BadSample, match=r"row 1: ends before frame 39 of 40|row 1: cannot be decoded"):
        video.frame(39)


def test_a_folder_without_pictures_is_named(tmp_path):
    with pytest.raises(BadSample, match="holds no frames"):
        open_video(str(tmp_path), "row 1")


def test_a_single_picture_is_a_video_of_one_frame(tmp_path):
    still(3).save(tmp_path / "a.png")
    video = open_video(str(tmp_path / "a.png"), "row 1")
    assert video.clip.frames == 1 and number_of(video.frame(0)[0]) == 3
