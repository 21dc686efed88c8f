"""What a task of lmms-eval shows, as text and pictures: images as they are, videos as the frames that training would take."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from PIL import Image

from megatron_moellava.config import DataError
from megatron_moellava.data.media import show_video
from megatron_moellava.data.placeholders import IMAGE_PLACEHOLDER, placed


def shown(id: str, context: str, visuals: Sequence, data) -> tuple[str, tuple[Image.Image, ...]]:
    """(text, one picture for each `<image>` in it). Visuals stand before the text unless it says where they belong.

    `data`: DataConfig of the checkpoint, for videos (names of files). Raises DataError for what is neither.
    """
    parts = [_part(id, visual, data) for visual in _flat(visuals)]
    images = tuple(image for _, found in parts for image in found)
    texts = [text for text, _ in parts]
    if (text := placed(context, texts)) is not None:
        return text, images
    if IMAGE_PLACEHOLDER in context:
        return context, images
    return "".join(f"{text}\n" for text in texts) + context, images


def _flat(visuals: Sequence) -> Iterable[Any]:
    return chain.from_iterable(visual if isinstance(visual, list) else [visual] for visual in visuals)


def _part(id: str, visual: Any, data) -> tuple[str, list[Image.Image]]:
    if isinstance(visual, Image.Image):
        return IMAGE_PLACEHOLDER, [visual.convert("RGB")]
    if isinstance(visual, str):
        return show_video(visual, f"request {id}: {visual}", data)
    raise DataError(
        f"request {id}: a visual is {type(visual).__name__}; only pictures and videos can be shown to this model"
    )
