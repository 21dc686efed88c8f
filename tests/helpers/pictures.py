"""Pictures and bodies as strangers send them."""

import base64
import io

from PIL import Image

from megatron_moellava.serving.pictures import PictureLimits

LIMITS = PictureLimits(max_bytes=200_000, max_pixels=1_000_000)


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 10, 10)).save(buffer, "png")
    return buffer.getvalue()


def body(**fields) -> dict:
    return {"messages": [{"role": "user", "content": "hi"}]} | fields
