"""Small videos whose frames say their number."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

BITS = 8  # stripes of a picture: black or white


def still(number: int, size=(64, 48)) -> Image.Image:
    """The frame of this number, in black and white stripes: no codec can mistake one for its neighbour."""
    stripes = np.repeat([[255 * (number >> bit & 1) for bit in range(BITS)]], size[0] // BITS, axis=1)
    return Image.fromarray(np.repeat(stripes, size[1], axis=0).astype(np.uint8)).convert("RGB")


def number_of(image: Image.Image) -> int:
    """Which frame a picture is."""
    stripes = np.asarray(image.convert("L")).reshape(image.height, BITS, -1)[:, :, 2:-2].mean(axis=(0, 2))
    return sum(1 << bit for bit in range(BITS) if stripes[bit] > 127)


def write_video(path: Path, frames: int = 40, rate: int = 10, codec: str = "mpeg4", key_every: int = 12) -> Path:
    """A video of `frames` numbered frames, of a kind that the file's ending says."""
    path.write_bytes(video_bytes(frames, rate, codec, key_every, kind=path.suffix[1:]))
    return path


def video_bytes(
    frames: int = 40, rate: int = 10, codec: str = "mpeg4", key_every: int = 12, kind: str = "mp4"
) -> bytes:
    """The content of such a file."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format={"mkv": "matroska", "ts": "mpegts"}.get(kind, kind)) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.codec_context.thread_count = 1  # threads that a test's loader workers would be forked beside
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", key_every
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(still(number))))
        container.mux(stream.encode())
    return buffer.getvalue()
