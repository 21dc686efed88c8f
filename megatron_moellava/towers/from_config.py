"""Tower <-> `config.json` and `preprocessor_config.json`, as strict as for backbones: an unknown key is an error."""

import dataclasses
import math
from dataclasses import replace
from pathlib import Path

from megatron_moellava.config import ConfigError
from megatron_moellava.hf_config import INERT, read_json, wrong_numbers
from megatron_moellava.towers.tower import Tower

FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "layer_norm_eps": "layernorm_epsilon",
    "hidden_act": "activation",
}
RESAMPLING = {3: "bicubic", 2: "bilinear"}  # Pillow's numbers
# What is done to every picture. (Some published files say `do_convert_rgb: null`, and pictures become RGB all the same.)
ALWAYS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
# Fields that older checkpoints do not have, and what they stand for there.
LATER = {
    "resample": RESAMPLING[3],
    "native": False,
    "post_layernorm": False,
    "projector": "mlp2x_gelu",
    "newline": False,
    "tiling": "next",
    "max_num_patches": 0,
    "num_frames": 1,
}
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def tower_from_hf_folder(path: Path, families, *, name: str) -> Tower:
    """The tower of a folder; preprocessing from `preprocessor_config.json` when there is one, else the family's own."""
    tower = tower_from_hf_config(read_json(path), families, name=name)
    processor = path / "preprocessor_config.json" if path.is_dir() else path.parent / "preprocessor_config.json"
    return _with_processor(tower, read_json(processor), name) if processor.exists() else tower


def tower_from_hf_config(config: dict, families, *, name: str) -> Tower:
    """The tower of a config of a vision model, or of the `vision_config` inside one of a two-tower model.

    Raises ConfigError, which lists what is not supported.
    """
    family = _family(config.get("model_type"), families)
    hf = family.SIZES[0].hf
    if config["model_type"] == hf.wrapper_model_type:
        config = {"model_type": hf.model_type, **config.get("vision_config", {})}
    settings = {**hf.defaults, **{key: value for key, value in config.items() if value is not None}}
    problems = _unsupported(settings, hf)
    if hf.counts_patches and not problems:
        problems = _with_image_size(settings)
    if problems:
        raise ConfigError(f"{name} (model_type {config['model_type']}) is not supported:\n" + "\n".join(problems))
    keys = FIELDS | dict(hf.fields)
    values = {field: settings[key] for key, field in keys.items() if key in settings}
    if wrong := wrong_numbers(Tower, values, keys):
        raise ConfigError(f"{name}: config.json cannot be read:\n" + "\n".join(wrong))
    values["activation"] = ACTIVATIONS[values["activation"]]
    return replace(family.SIZES[0], name=name, source=name, **values)


def _with_image_size(settings: dict) -> list[str]:
    """Put `image_size` in place of `num_patches`: the square picture that has so many. Problems, if there are some."""
    patches, size = settings.pop("num_patches"), settings["patch_size"]
    side = math.isqrt(patches) if type(patches) is int and patches > 0 else 0
    if side == 0 or side**2 != patches:
        return [f"  num_patches={patches!r}: must be a square above 0, since positions are a square table"]
    settings["image_size"] = side * size if type(size) is int else size
    return []


def _family(model_type: str | None, families):
    for family in families:
        if model_type in (family.SIZES[0].hf.model_type, family.SIZES[0].hf.wrapper_model_type):
            return family
    own = (family.SIZES[0].hf for family in families)
    known = ", ".join(hf.wrapper_model_type if hf.is_wrapped else hf.model_type for hf in own)
    raise ConfigError(f"model_type={model_type!r} is not a supported vision tower; supported: {known}")


def _unsupported(settings: dict, hf) -> list[str]:
    own = FIELDS.keys() | hf.fields.keys()
    known = (INERT | own | hf.constants.keys() | set(hf.inert)) - {"image_size" if hf.counts_patches else ""}
    known |= {"num_patches"} if hf.counts_patches else set()
    problems = [
        f"  {key}={settings[key]!r}: only {value!r} is supported"
        for key, value in hf.constants.items()
        if settings.get(key, value) != value
    ]
    if settings.get("hidden_act") not in ACTIVATIONS:
        problems.append(f"  hidden_act={settings.get('hidden_act')!r}: supported are {', '.join(ACTIVATIONS)}")
    return problems + [
        f"  {key}={value!r}: unknown key, it may change the features; remove it if it does not"
        for key, value in settings.items()
        if key not in known and value not in (None, False)
    ]


def _with_processor(tower: Tower, processor: dict, name: str) -> Tower:
    """Raises ConfigError for what the pictures of a run would not get."""
    crops = processor.get("do_center_crop", tower.resize == "shortest_edge_crop")
    sizes = [processor.get("size"), processor.get("crop_size") if crops else None]
    found = {side for size in sizes if size for side in (size.values() if isinstance(size, dict) else [size])}
    problems = [
        f"  {key}={processor[key]!r}: only {value!r} is supported"
        for key, value in ALWAYS.items()
        if processor.get(key) not in (None, value)
    ]
    own = {kind: number for number, kind in RESAMPLING.items()}[tower.resample] if tower.native else 3
    problems += [f"  resample={processor['resample']!r}: supported are 2 (bilinear) and 3 (bicubic)"] * (
        processor.get("resample", own) not in RESAMPLING
    )
    if tower.native:
        problems += _native_problems(tower, processor)
        found = set()
    problems += [
        f"  size, crop_size: {', '.join(map(str, sorted(found)))} instead of image_size={tower.image_size}"
    ] * (bool(found - {tower.image_size}))
    if problems:
        raise ConfigError(f"preprocessor_config.json of {name} is not supported:\n" + "\n".join(problems))
    return replace(
        tower,
        image_mean=tuple(processor.get("image_mean", tower.image_mean)),
        image_std=tuple(processor.get("image_std", tower.image_std)),
        resize=tower.resize if tower.native else "shortest_edge_crop" if crops else "square",
        resample=RESAMPLING[processor.get("resample", own)],
        max_num_patches=_budget(tower, processor) if tower.native else 0,
    )


def _budget(tower: Tower, processor: dict) -> int:
    patches = processor.get("max_num_patches", 0)
    return 0 if patches == tower.num_positions else patches


def _native_problems(tower: Tower, processor: dict) -> list[str]:
    """What a processor at native resolution must not say."""
    patches = processor.get("max_num_patches", 1)
    problems = [f"  max_num_patches={patches!r}: must be a whole number above 0"] * (
        type(patches) is not int or patches < 1
    )
    size = processor.get("patch_size", tower.patch_size)
    return problems + [f"  patch_size={size!r} instead of {tower.patch_size}"] * (size != tower.patch_size)


def hf_config_of(tower: Tower) -> dict:
    """`config.json` of the tower as transformers reads it: the inverse of `tower_from_hf_config`."""
    config: dict = {"model_type": tower.hf.model_type, "architectures": [tower.hf.architecture], **tower.hf.constants}
    config.pop("dropout", None)
    config |= {key: getattr(tower, field) for key, field in (FIELDS | dict(tower.hf.fields)).items()}
    config["hidden_act"] = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[tower.activation]
    if tower.hf.counts_patches:
        config["num_patches"] = (config.pop("image_size") // tower.patch_size) ** 2
    return config


def published_config_of(tower: Tower) -> dict:
    """`config.json` of the tower as its family is published: by itself, or as part of a config of two towers."""
    config = hf_config_of(tower)
    return {"model_type": tower.hf.wrapper_model_type, "vision_config": config} if tower.hf.is_wrapped else config


def processor_config_of(tower: Tower) -> dict:
    """`preprocessor_config.json` of the tower."""
    size = tower.image_size
    square = {"height": size, "width": size}
    config = {
        "image_processor_type": tower.hf.image_processor,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": {kind: number for number, kind in RESAMPLING.items()}[tower.resample],
        "rescale_factor": 1 / 255,
        "image_mean": list(tower.image_mean),
        "image_std": list(tower.image_std),
        "size": square,
    }
    if tower.native:
        del config["size"]
        config |= {"patch_size": tower.patch_size, "max_num_patches": tower.num_patches}
    if tower.resize == "shortest_edge_crop":
        config |= {"do_center_crop": True, "crop_size": square, "size": {"shortest_edge": size}}
    return config


def tower_fields(tower: Tower) -> dict:
    """JSON-able fields, for run.json; the later ones where they are not what they were when they were no fields."""
    skipped = {"hf", "mapping", "unused"}
    if not tower.native:
        skipped |= {name for name, before in LATER.items() if getattr(tower, name) == before}
    fields = {item.name: getattr(tower, item.name) for item in dataclasses.fields(Tower) if item.name not in skipped}
    return {
        "family": tower.hf.family,
        **fields,
        "image_mean": list(tower.image_mean),
        "image_std": list(tower.image_std),
    }


def tower_from_fields(fields: dict, families) -> Tower:
    """The inverse of `tower_fields`. ConfigError for a family of a later version."""
    values = dict(fields)
    name = values.pop("family")
    family = next((family for family in families if family.SIZES[0].hf.family == name), None)
    if family is None:
        raise ConfigError(f"tower family={name!r} is not known to this version; upgrade megatron-moellava")
    values["image_mean"], values["image_std"] = tuple(values["image_mean"]), tuple(values["image_std"])
    return replace(family.SIZES[0], **values)
