"""What an export needs besides its weights and its tokenizer, so that the next tool can ask it: ends of answers, processor.

All of it is data: no code of a tokenizer's folder is run, and nothing asks for leave to run it.
"""

from pathlib import Path

from megatron_moellava.costs.shapes import Model
from megatron_moellava.data.encode import answer_ends
from megatron_moellava.data.quantities import COLOURS
from megatron_moellava.data.sample import IMAGE_PLACEHOLDER
from megatron_moellava.data.templates import Template, get_template
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.towers import Tower
from megatron_moellava.towers.from_config import processor_config_of

SPECIAL = ("eos_token_id", "bos_token_id", "pad_token_id")


def levels_of_others(trained: dict[str, dict]) -> str:
    """Names of `data.modalities` whose levels no processor of others shows as training did; colours are shown as ever."""
    modalities = trained.get("data", {}).get("modalities") or ()
    return ", ".join(item["name"] for item in modalities if item["levels"] != COLOURS)


def template_of(model: Model, trained: dict[str, dict]) -> Template:
    """The conversation version that the weights were trained with; the backbone's own where that is not known."""
    return get_template(trained.get("data", {}).get("template") or model.backbone.template)


def special_ids(template: Template, tokenizer: Path | None, source: dict) -> dict:
    """`eos_token_id` and the like: where answers end by template and tokenizer, and what the source says.

    `source`: the imported config.json and generation_config.json, merged.
    """
    text = source.get("text_config") or {}
    found = {name: source.get(name, text.get(name)) for name in SPECIAL}
    if tokenizer:
        loaded = load_tokenizer(tokenizer)
        said = found["eos_token_id"]
        ends = [loaded.eos_id, *sorted(answer_ends(template, loaded)[0])]
        ends += said if isinstance(said, list) else [] if said is None else [said]
        ends = list(dict.fromkeys(ends))
        found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        found["bos_token_id"] = loaded.bos_id if found["bos_token_id"] is None else found["bos_token_id"]
    return {name: value for name, value in found.items() if value is not None}


def processor_files(tower: Tower, image_aspect_ratio: str) -> dict[str, dict]:
    """`preprocessor_config.json` and `processor_config.json` of transformers' LlavaProcessor.

    `image_aspect_ratio`: data.image_aspect_ratio of the training; "pad" is that processor's `do_pad`.
    """
    pictures = {"do_center_crop": False} | processor_config_of(tower) | {"processor_class": "LlavaProcessor"}
    if tower.newline:
        name = {"next": "LlavaNext", "onevision": "LlavaOnevision"}[tower.tiling]
        pictures |= {"image_processor_type": f"{name}ImageProcessor", "processor_class": f"{name}Processor"}
        pictures["image_grid_pinpoints"] = tower.tiles.pinpoints(tower.image_size)
    elif image_aspect_ratio == "pad":
        pictures |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    processor = {
        "processor_class": pictures["processor_class"],
        "image_token": IMAGE_PLACEHOLDER,
        "patch_size": tower.patch_size,
        "num_additional_image_tokens": int(tower.class_token),
        "vision_feature_select_strategy": "default" if tower.drop_first_feature else "full",
    }
    return {"preprocessor_config.json": pictures, "processor_config.json": processor}
