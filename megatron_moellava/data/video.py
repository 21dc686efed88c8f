"""Frames of videos: of a container (mp4, webm, ...), of an animated picture, of a folder of pictures.

A frame is the i-th of n, each from the middle of its share of the video, so that the same numbers mean the same frames whatever
the container. Containers are searched, not decoded from the start, and what a file is its first bytes say: ffmpeg is told the
format, since some of those that it would guess name other files to read.
"""

import contextlib
import functools
import importlib.util
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence, UnidentifiedImageError

from megatron_moellava.data import images
from megatron_moellava.data.bad_sample import BadSample
from megatron_moellava.data.paths import locate, natural
from megatron_moellava.data.sample import IMAGE_PLACEHOLDER
from megatron_moellava.towers import POOLINGS

STILLS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
FOLDER_RATE = 1.0  # pictures of a folder are a second apart: nothing says better
HEAD = 200  # bytes of a file that say what it is
AHEAD = 48  # frames that are decoded on the way rather than sought
FARTHEST = 10_000  # frames that are decoded for the sake of one: more is an attack, or a file to be encoded anew
MISSED = 2  # frames that a file may have less than its header says: containers round
CONTAINERS = (  # (offset, bytes at the file's start) -> ffmpeg's name of the format
    (4, b"ftyp", "mp4"),
    (4, b"moov", "mp4"),
    (4, b"mdat", "mp4"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),  # and webm
    (8, b"AVI ", "avi"),
    (0, b"OggS", "ogg"),
    (0, b"FLV\x01", "flv"),
    (0, b"\0\0\x01\xba", "mpeg"),
    (188, b"\x47", "mpegts"),
)
PICTURES = (
    b"GIF8",
    b"\x89PNG",
    b"RIFF",
)  # of animations, which Pillow reads; AVI is a RIFF file, too, and found before
STAMPS = {  # data.video_times -> what stands before a frame (or those pooled with it), {} its seconds; what behind it
    "none": ("", ""),
    "seconds": ("{:.1f} s: ", "\n"),
}
FRAME = "moellava_frame"  # in the `info` of a picture: (i, n), the i-th of n frames of a video
Origin = bytes | str  # a file's content, or its path


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """How long a video is."""

    frames: int
    rate: float  # frames per second
    first: int = 0  # number of its first frame

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.frames / self.rate

    def pick(self, index: int, count: int) -> int:
        """The number of the index-th of `count` frames: the middle of its share."""
        return self.first + min((2 * index + 1) * self.frames // (2 * count), self.frames - 1)

    def time(self, index: int, count: int) -> float:
        """When that is, in seconds from the start."""
        return self.pick(index, count) / self.rate

    def num_frames(self, data) -> int:
        """Frames to show (`data`: DataConfig): video_frames, or as many as video_fps gives, but never more."""
        if not data.video_fps:
            return data.video_frames
        return max(1, min(data.video_frames, round(self.seconds * data.video_fps)))

    def texts(self, data) -> list[str]:
        """What a text says for each frame: `<image>`, and when it is if `data.video_times` asks for it."""
        count, together = self.num_frames(data), POOLINGS[data.video_pooling].temporal
        before, behind = STAMPS[data.video_times]
        texts = []
        for index in range(count):
            first, last = index % together == 0, (index + 1) % together == 0 or index + 1 == count
            stamp = before.format(self.time(index, count)) if first else ""
            texts.append(f"{stamp}{IMAGE_PLACEHOLDER}{behind if last else ''}")
        return texts

    def cut(self, start: float, end: float) -> "Clip":
        """The part between two times in seconds; numbers stay those of the whole."""
        first = min(int(start * self.rate), self.frames - 1)
        return replace(self, first=first, frames=max(1, min(int(end * self.rate), self.frames) - first))


class Video(ABC):
    """An opened video. Its methods raise BadSample."""

    clip: Clip
    size: tuple[int, int]  # (width, height) of its frames, as stored; (0, 0): they may differ

    @abstractmethod
    def frame(self, number: int) -> tuple[Image.Image, tuple[str, ...]]:
        """The RGB picture number `number`, and notes on it."""


class Pictures(Video):
    """A folder of pictures, in the order of their numbers."""

    def __init__(self, folder: str, where: str, trusted: bool):
        files = [file for file in Path(folder).iterdir() if file.suffix.lower() in STILLS]
        if not files:
            raise BadSample("unreadable video", f"{where}: folder {folder} holds no frames; add images or name a file")
        self.folder, self.where, self.trusted = folder, where, trusted
        self.files = sorted(files, key=lambda file: natural(file.name))
        self.clip, self.size = Clip(frames=len(files), rate=FOLDER_RATE), (0, 0)

    def frame(self, number: int) -> tuple[Image.Image, tuple[str, ...]]:
        """See Video."""
        name = self.files[number].name
        return images.open_image(
            locate(self.folder, name, self.where, self.trusted), f"{self.where}, frame {name!r}", "video"
        )


class Animation(Video):
    """GIF, WebP, APNG."""

    def __init__(self, origin: Origin, where: str, formats: tuple[str, ...] | None = None):
        self.where = where
        with _guarded(where):
            self.image = Image.open(io.BytesIO(origin) if isinstance(origin, bytes) else origin, formats=formats)
            self.size = self.image.size
            _check_size(self.size, where)
            frames = getattr(self.image, "n_frames", 1)
            self.clip = Clip(frames=frames, rate=1000.0 / max(float(self.image.info.get("duration") or 0), 1.0))

    def frame(self, number: int) -> tuple[Image.Image, tuple[str, ...]]:
        """See Video."""
        with _guarded(self.where):
            picture, notes = images.to_rgb(ImageSequence.Iterator(self.image)[number])
            return picture.copy(), tuple(note for note in notes if note != images.FIRST_FRAME)


class Container(Video):
    """What ffmpeg decodes, through PyAV."""

    def __init__(self, origin: Origin, kind: str, where: str):
        if importlib.util.find_spec("av") is None:
            raise BadSample(
                "unreadable video", f"{where}: decoding a video needs `pip install 'megatron-moellava[video]'`"
            )
        import av

        self.where = where
        with _guarded(where):
            self.container: Any = av.open(io.BytesIO(origin) if isinstance(origin, bytes) else origin, format=kind)
            self.stream = self.container.streams.video[0]
            # Threads do not live on in a worker process that is forked later: it would wait for them for ever.
            self.stream.codec_context.thread_count = 1
            self.options = (
                {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}
            )  # of the colours' conversion
            self.size = self.stream.width, self.stream.height
            _check_size(self.size, where)
            rate = float(self.stream.average_rate or self.stream.guessed_rate or 0)
            if rate <= 0:
                raise ValueError("no frame rate")
            self.start = float((self.stream.start_time or 0) * self.stream.time_base)
            self.clip = Clip(frames=self._num_frames(rate), rate=rate)
            self._rewind(0)

    def _num_frames(self, rate: float) -> int:
        """As the header says; of streams that do not say, the packets, which are read and not decoded."""
        if self.stream.frames:
            return int(self.stream.frames)
        if self.stream.duration:
            return max(1, round(float(self.stream.duration * self.stream.time_base) * rate))
        if self.container.duration:
            return max(1, round(self.container.duration / 1e6 * rate))
        count = sum(packet.size > 0 for packet in self.container.demux(self.stream))
        return max(1, count)

    def frame(self, number: int) -> tuple[Image.Image, tuple[str, ...]]:
        """See Video. Frames that are asked for in their order are decoded once."""
        with _guarded(self.where):
            if number < self.at or number > self.at + AHEAD:
                self._rewind(number)
            if self.at < number and not self._decode(number):
                self._rewind(max(number - MISSED, 0))  # the end; the frames before it have gone by
                self._decode(number)
            if self.last is not None and self.at >= number - MISSED:
                return _upright(self.last, **self.options), ()
        raise BadSample(
            "unreadable video", f"{self.where}: ends before frame {number} of {self.clip.frames}; replace the file"
        )

    def _rewind(self, number: int) -> None:
        """To the last key frame at or before a frame. Some containers find only a later one: then further back."""
        target = number
        while True:
            if target > 0:
                seconds = self.start + target / self.clip.rate
                self.container.seek(int(seconds / self.stream.time_base), stream=self.stream, backward=True)
            else:
                self.container.seek(0)
            self.decoded: Iterator[Any] = self.container.decode(self.stream)
            self.last, self.at = None, -1  # what was decoded last, and its number
            self._decode(0)
            if self.at <= number or target <= 0:
                return
            target -= AHEAD

    def _decode(self, number: int) -> bool:
        """Up to a frame, or to the end: whether anything was left to decode."""
        before = self.at
        for step, frame in enumerate(self.decoded):
            if step > FARTHEST:
                raise ValueError(f"no key frame within {FARTHEST:,} frames")
            self.last, self.at = frame, round((float(frame.time or 0) - self.start) * self.clip.rate)
            if self.at >= number:
                return True
        return self.at > before


def _check_size(size: tuple[int, int], where: str) -> None:
    if size[0] * size[1] > images.MAX_PIXELS:
        raise BadSample(
            "decompression bomb", f"{where}: {size[0]} x {size[1]} pixels, more than {images.MAX_PIXELS:,}; shrink it"
        )


def _upright(frame, **options) -> Image.Image:
    """As players show it: telephones store which way they were held."""
    turn = getattr(frame, "rotation", 0)  # degrees against the clock; the `av` that lmms-eval asks for has none
    image = frame.to_image(**options)
    return image.rotate(turn, expand=True) if turn else image


@contextlib.contextmanager
def _guarded(where: str) -> Iterator[None]:
    """What decoders raise on damaged files becomes a BadSample; nearly anything may come."""
    try:
        yield
    except BadSample:
        raise
    except UnidentifiedImageError:  # its message names an address in memory
        raise BadSample("unreadable video", f"{where}: cannot be decoded: no video that is known; replace it") from None
    except Exception as error:
        text = f"{where}: cannot be decoded ({type(error).__name__}: {error}); replace the file"
        raise BadSample("unreadable video", text) from None


def last_video(origin: Origin, where: str, trusted: bool = False) -> Video:
    """`open_video`, kept open: a sample's frames are asked for one after the other. For one thread of a process."""
    return _last_video(origin, where, trusted, os.getpid())  # a forked process must not share the file's position


@functools.lru_cache(maxsize=1)
def _last_video(origin: Origin, where: str, trusted: bool, process: int) -> Video:
    return open_video(origin, where, trusted)


def open_video(origin: Origin, where: str, trusted: bool = False, formats: tuple[str, ...] | None = None) -> Video:
    """The video of a path or of a file's content. `formats`: those of Pillow that may be one; None: all it knows.

    Raises BadSample for what is none.
    """
    if isinstance(origin, str) and os.path.isdir(origin):
        return Pictures(origin, where, trusted)
    head = _head(origin, where)
    kinds = [kind for offset, mark, kind in CONTAINERS if head[offset:].startswith(mark)]
    if not kinds or (kinds[0] == "mpegts" and head.startswith(PICTURES)):
        return Animation(origin, where, formats)
    return Container(origin, kinds[0], where)


def _head(origin: Origin, where: str) -> bytes:
    if isinstance(origin, bytes):
        return origin[:HEAD]
    try:
        with open(origin, "rb") as file:
            return file.read(HEAD)
    except OSError:
        raise BadSample("missing image", f"{where}: no such video; check image_folder and the row's `video`") from None
