"""Pictures that strangers send."""

import base64
import struct
import zlib

import pytest

from megatron_moellava.config import DataConfig, DataError
from megatron_moellava.data.video import FRAME
from megatron_moellava.serving.pictures import FRAMES, PictureLimits, open_url, open_video_url
from tests.helpers.pictures import LIMITS, data_url, png
from tests.helpers.videos import number_of, video_bytes


def png_header(width: int, height: int) -> bytes:
    """A picture that claims to be enormous, and would unpack to zeros."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"\0" * 1_000_000)
    chunks = b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, body)
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_a_data_url_becomes_a_picture():
    assert open_url(data_url(png(5, 7)), LIMITS).size == (5, 7)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (data_url(png_header(60_000, 60_000)), "pixels"),
        (data_url(png(2000, 1000)), "pixels"),
        (data_url(b"\0" * 300_000), "bytes"),
        (data_url(b"not a picture"), "cannot be read"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"), "cannot be read"),
        (data_url(png(5, 5))[:-9] + "@@@", "base64"),
        ("data:text/plain;base64,aGVsbG8=", "form"),
        ("file:///etc/passwd", "data: URL"),
        ("/etc/passwd", "data: URL"),
        ("http://127.0.0.1/a.png", "not allowed"),
    ],
)
def test_what_is_no_acceptable_picture_is_refused(url, message):
    with pytest.raises(DataError, match=message):
        open_url(url, LIMITS)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "10.0.0.1", "169.254.169.254", "localhost"])
def test_remote_urls_never_lead_inside(host):
    with pytest.raises(DataError, match="not a public one"):
        open_url(f"http://{host}/a.png", PictureLimits(allow_remote=True))


def test_a_video_is_frames_and_what_is_none_is_refused():
    url = "data:video/mp4;base64," + base64.b64encode(video_bytes(frames=10)).decode()
    text, frames = open_video_url(url, LIMITS, DataConfig(video_frames=2))
    assert text == "<image><image>" and [number_of(frame) for frame in frames] == [2, 7]
    small = PictureLimits(max_pixels=64 * 48 - 1)
    playlist = "data:video/mp4;base64," + base64.b64encode(b"#EXTM3U\nfile:///etc/passwd\n").decode()
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"  # which Pillow would have run
    for bad, limits, message in (
        (url, small, "frames have 3,072 pixels, more than 3,071"),
        ("https://example.com/v.mp4", LIMITS, "must be a data: URL"),
        ("data:text/plain;base64,AAAA", LIMITS, "video_url must have the form"),
        (playlist, LIMITS, "the video: cannot be decoded"),
        (data_url(program), LIMITS, "the video: cannot be decoded: no video that is known"),
        (url, PictureLimits(max_bytes=10), "the video has more than 10 bytes"),
    ):
        with pytest.raises(DataError, match=message):
            open_video_url(bad, limits, DataConfig())


def test_a_video_may_come_as_its_frames():
    """`data:video/jpeg` with a comma between two frames, of any format that a picture may have."""
    frames = [base64.b64encode(png(5 + number, 7)).decode() for number in range(4)]
    url = FRAMES + ",".join(frames)
    text, shown = open_video_url(url, LIMITS, DataConfig(video_frames=2))
    assert text == "<image><image>" and [frame.size for frame in shown] == [(6, 7), (8, 7)]
    assert [frame.info[FRAME] for frame in shown] == [(0, 2), (1, 2)]
    bomb = base64.b64encode(png_header(60_000, 60_000)).decode()
    for bad, limits, message in (
        (f"{url},{bomb}", LIMITS, "3,600,000,000|60000 x 60000 pixels"),
        (url + ",", LIMITS, "cannot be read"),
        (url[:-9] + "@@@", LIMITS, "the video's base64 text is broken"),
        (url, PictureLimits(max_bytes=100), "the video has more than 100 bytes"),
        (FRAMES + 100_000 * ",", LIMITS, "the video has 100,001 frames, more than 1,000"),
    ):
        with pytest.raises(DataError, match=message):
            open_video_url(bad, limits, DataConfig(video_frames=2))
