"""The boxes, points and polygons of an answer, in pixels of the pictures that it is about."""

from collections.abc import Sequence

from PIL import Image

from megatron_moellava.data import geometry
from megatron_moellava.data.regions import Located, View, locate
from megatron_moellava.inference.prompts import Prompter


def locate_answer(
    text: str, images: Sequence[Image.Image], prompter: Prompter, image_aspect_ratio: str = "model"
) -> list[Located]:
    """What `text` names in the last of `images`, read as the checkpoint was trained (`data.box_format`)."""
    data = prompter.data
    aspect_ratio = data.image_aspect_ratio if image_aspect_ratio == "model" else image_aspect_ratio
    views = [
        View(
            stored=geometry.Map(size=image.size),
            seen=geometry.seen(*image.size, prompter.tower, aspect_ratio=aspect_ratio, grid=data.image_grid),
        )
        for image in images
    ]
    return locate(text, data.box_format, views)
