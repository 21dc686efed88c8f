"""Pictures that strangers send: data URLs, and remote ones where they are allowed. Everything is checked before decoding."""

import base64
import binascii
import http.client
import io
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

from PIL import Image

from megatron_moellava.config import DataConfig, DataError, Modality
from megatron_moellava.data.images import open_image
from megatron_moellava.data.media import shown_frames
from megatron_moellava.data.quantities import formats_of, open_picture
from megatron_moellava.data.video import FOLDER_RATE, Clip, Video, open_video

FRAMES = "data:video/jpeg;base64,"  # a video as frames with commas between them: vLLM's and SGLang's way
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow's other decoders start programs or are rarely looked at


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureLimits:
    """What a picture may cost before it is refused."""

    max_bytes: int = 20_000_000  # of one encoded picture
    max_pixels: int = 50_000_000  # of one decoded picture
    max_frames: int = 1000  # of a video that comes as frames
    allow_remote: bool = False  # fetch http and https URLs of public hosts
    remote_seconds: float = 10.0


def open_url(url: str, limits: PictureLimits, modality: Modality | None = None) -> Image.Image:
    """An RGB picture from a URL, of a modality or a plain one. Raises DataError that says what is wrong with it."""
    name = modality.name if modality else "image"
    if url.startswith("data:"):
        data = _from_data_url(url, limits)
    elif url.startswith(("http://", "https://")):
        if not limits.allow_remote:
            raise DataError("remote image URLs are not allowed here; send the picture as a data: URL")
        data = _fetch(url, limits)
    else:
        raise DataError(f"{name}_url must be a data: URL (data:image/png;base64,...)")
    _check(data, limits, (modality and formats_of(modality)) or FORMATS)
    return open_image(data, "image")[0] if modality is None else open_picture(data, modality, name)[0]


def endings(modality: Modality) -> str:
    """Of the names of its files, as a page's file dialog takes them; empty: all."""
    known = Image.registered_extensions()
    return ",".join(ending for ending, kind in known.items() if kind in formats_of(modality))


def png_url(image: Image.Image) -> str:
    """A data URL of a PNG."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


class _Frames(Video):
    """Frames that a client has taken out of a video, as a folder of pictures would hold them."""

    def __init__(self, contents: list[bytes]):
        self.contents = contents
        self.clip, self.size = Clip(frames=len(contents), rate=FOLDER_RATE), (0, 0)

    def frame(self, number: int) -> tuple[Image.Image, tuple[str, ...]]:
        """See Video."""
        return open_image(self.contents[number], f"the video, frame {number}")


def open_video_url(url: str, limits: PictureLimits, data: DataConfig) -> tuple[str, list[Image.Image]]:
    """(text with an `<image>` for each frame, frames) of a data URL with a video or its frames, as training shows it.

    Raises DataError that says what is wrong with it.
    """
    if not url.startswith("data:"):
        raise DataError("video_url must be a data: URL (data:video/mp4;base64,...)")
    if url.startswith(FRAMES):
        return shown_frames(_frames(url.removeprefix(FRAMES), limits), data)
    video = open_video(_from_data_url(url, limits, "video"), "the video", formats=FORMATS)
    if (pixels := video.size[0] * video.size[1]) > limits.max_pixels:
        raise DataError(
            f"the video's frames have {pixels:,} pixels, more than {limits.max_pixels:,}; send a smaller one"
        )
    return shown_frames(video, data)


def _frames(text: str, limits: PictureLimits) -> _Frames:
    _check_length(text, limits, "video")
    if (count := text.count(",") + 1) > limits.max_frames:
        raise DataError(f"the video has {count:,} frames, more than {limits.max_frames:,}; send fewer of them")
    contents = [_decoded(part, "video") for part in text.split(",")]
    for content in contents:
        _check(content, limits)
    return _Frames(contents)


def _from_data_url(url: str, limits: PictureLimits, kind: str = "image") -> bytes:
    head, comma, text = url.partition(",")
    if not comma or not head.startswith((f"data:{kind}/", "data:image/")) or not head.endswith(";base64"):
        raise DataError(f"{kind}_url must have the form data:{kind}/<type>;base64,<data>")
    _check_length(text, limits, kind)
    return _decoded(text, kind)


def _check_length(text: str, limits: PictureLimits, kind: str) -> None:
    if len(text) > limits.max_bytes * 4 / 3 + 4:
        raise DataError(f"the {kind} has more than {limits.max_bytes:,} bytes; send a smaller one")


def _decoded(text: str, kind: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"the {kind}'s base64 text is broken") from None


def _check(data: bytes, limits: PictureLimits, formats: tuple[str, ...] = FORMATS) -> None:
    """Format and size from the header alone: a bomb is never unpacked."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            width, height = image.size
    except Exception:
        raise DataError(f"the image cannot be read; use one of {', '.join(formats)}") from None
    if width * height > limits.max_pixels or width * height == 0:
        raise DataError(f"the image has {width} x {height} pixels, more than {limits.max_pixels:,}; send a smaller one")


def _fetch(url: str, limits: PictureLimits) -> bytes:
    """GET without redirects, from a public address that is resolved once: a name that changes cannot lead inside."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        host = parts.hostname or ""
        address = _public_address(host, port)
        raw = socket.create_connection((address, port), timeout=limits.remote_seconds)
        if parts.scheme == "https":
            raw = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
        connection = http.client.HTTPConnection(host, port, timeout=limits.remote_seconds)
        connection.sock = raw
        try:
            connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
            response = connection.getresponse()
            if response.status != 200:
                raise DataError(f"the image's server answered {response.status}")
            data = response.read(limits.max_bytes + 1)
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(f"the image cannot be fetched ({type(error).__name__})") from None
    if len(data) > limits.max_bytes:
        raise DataError(f"the image has more than {limits.max_bytes:,} bytes; send a smaller one")
    return data


def _public_address(host: str, port: int) -> str:
    addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    if not addresses or not all(ipaddress.ip_address(address).is_global for address in addresses):
        raise DataError("the image's host is not a public one")
    return sorted(addresses)[0]
