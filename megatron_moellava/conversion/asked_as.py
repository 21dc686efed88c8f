"""How a model wants to be asked: settings of its training that layouts have no keys for, and that exports say all the same."""

from dataclasses import asdict

from megatron_moellava.config import DataConfig
from megatron_moellava.costs.shapes import Model

ASKED_AS = (
    "template",
    "image_aspect_ratio",
    "max_image_tokens",
    "max_sample_image_tokens",
    "enlarge_images",
    "box_format",
    "video_frames",
    "video_fps",
    "video_times",
    "video_pooling",
    "max_images",
)
OF_LANGUAGE = ("template", "box_format")  # what a language model keeps of them where it goes without its tower


def asked_as(model: Model, trained: dict[str, dict], found: dict[str, dict]) -> dict:
    """{field: value} of `data` that an import of the export would not know by itself.

    `trained`: what it was trained with (`checkpoint.description.trained_with`); nothing is said of what is not known.
    `found`: what an import concludes from the rest of the config.
    """
    said = trained.get("data", {})
    if said.get("template") == "":
        said = said | {"template": model.backbone.template}
    usual = asdict(DataConfig()) | found.get("data", {})
    names = ASKED_AS if model.tower else OF_LANGUAGE
    return {name: said[name] for name in names if name in said and said[name] != usual[name]}
