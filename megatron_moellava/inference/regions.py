"""The boxes, points and polygons of an answer, in pixels of the pictures that it is about."""

from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from megatron_moellava.data import geometry, media
from megatron_moellava.data.regions import Located, locate
from megatron_moellava.data.video import FRAME
from megatron_moellava.inference.prompts import Prompter


def locate_answer(
    text: str, images: Sequence[Image.Image], prompter: Prompter, image_aspect_ratio: str = "model"
) -> list[Located]:
    """What `text` names in the last of `images`, read as the checkpoint was trained (`data.box_format`)."""
    data = prompter.data
    data = data if image_aspect_ratio == "model" else replace(data, image_aspect_ratio=image_aspect_ratio)  # type: ignore[arg-type]
    views = [
        media.view(geometry.Map(size=image.size), prompter.tower_of(image), data, plan, FRAME in image.info)
        for image, plan in zip(images, prompter.plans(images, "the answer") or (None,) * len(images), strict=True)
    ]
    return locate(text, data.box_format, views)
