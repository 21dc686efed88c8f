"""The released layouts' `config.json`: MoE-LLaVA's (all stages) and LLaVA-1.5's. Read for import, written for export.

Their code has one way to compute where this program has switches. An export of a run that computes otherwise says so in
a key of its own, `trained_with`, which an import reads.
"""

import dataclasses
from dataclasses import replace
from pathlib import Path

from megatron_moellava.backbones.from_config import hf_config_of
from megatron_moellava.checkpoint.description import TRAINED_WITH
from megatron_moellava.config import ConfigError, MoEConfig, from_dict
from megatron_moellava.conversion.asked_as import asked_as
from megatron_moellava.conversion.layout import LANGUAGE_MODEL, LLAVA, NATIVE, ORIGINAL, Layout
from megatron_moellava.conversion.native import tower_with_projector
from megatron_moellava.costs.shapes import Model
from megatron_moellava.data.templates import get_template
from megatron_moellava.placement import moe_layers
from megatron_moellava.towers import FAMILIES, TILINGS, TOWERS, Tower, checked, get_tower
from megatron_moellava.towers.from_config import tower_from_hf_config

MERGES = {"llava_next": "next", "llava_onevision": "onevision"}  # transformers' model_type -> Tower.tiling
UNPAD = "spatial_unpad"  # LLaVA's own name of that merge of tiles
# Multimodal settings that this program supports in one way only.
SUPPORTED = {
    "image_projector_type": ("mlp2x_gelu",),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,),
    "mm_video_tower": (None,),
    "mm_patch_merge_type": ("flat", UNPAD),
    "vision_feature_select_strategy": ("default", "full"),
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
}


def moe_config(config: dict) -> MoEConfig | None:
    """`config.moe` of a released MoE checkpoint; it runs with the original's router."""
    moe = config.get("moe") or {}
    if not moe.get("moe_enable"):
        return None
    said = said_of(config).get("moe") or {}
    return from_dict(MoEConfig, dataclasses.asdict(_released_moe(config, moe)) | said)


RELEASED = ("num_experts", "top_k_experts", "router_aux_loss_coef")  # keys that every released config.moe has


def _released_moe(config: dict, moe: dict) -> MoEConfig:
    lacking = [key for key in RELEASED if key not in moe]
    if not moe.get("moe_layers_idx") and "moe_mode" not in moe:
        lacking.append("moe_layers_idx")
    if lacking:
        raise ConfigError(f"config.moe lacks {', '.join(lacking)}; add what the released config.json has")
    experts = moe["num_experts"] if isinstance(moe["num_experts"], list) else [moe["num_experts"]]
    if len(set(experts)) != 1:
        raise ConfigError(f"config.moe.num_experts={experts}: all MoE layers must have equally many experts")
    return MoEConfig(
        num_moe_experts=experts[0],
        moe_router_topk=moe["top_k_experts"],
        placement=tuple(moe.get("moe_layers_idx") or moe_layers(moe["moe_mode"], config["num_hidden_layers"])),
        router="original",
        moe_aux_loss_coeff=moe["router_aux_loss_coef"],
        moe_expert_capacity_factor=moe.get("capacity_factor", 1.0),
        eval_capacity_factor=moe.get("eval_capacity_factor", 1.0),
        min_capacity=moe.get("min_capacity", 4),  # the original's class default, where a config has none
        use_residual=moe.get("use_residual", False),
    )


def said_of(config: dict) -> dict[str, dict]:
    """`trained_with` of an export of this program. Raises ConfigError for what no export has written."""
    said = config.get("trained_with") or {}
    if not isinstance(said, dict) or not all(isinstance(fields, dict) for fields in said.values()):
        raise ConfigError(
            f"config.json: trained_with={said!r} must be an object of objects; export the checkpoint again"
        )
    unknown = [
        f"{section}.{name}"
        for section, fields in said.items()
        for name in fields
        if section in TRAINED_WITH and name not in TRAINED_WITH[section]
    ]
    if unknown:
        raise ConfigError(f"config.json: trained_with holds {', '.join(unknown)}, which this version does not know")
    return said


def tower_of(config: dict, layout: Layout, given: str | None) -> Tower | None:
    """The vision tower of a source: as given, or as its config says. None for a language model alone.

    Raises ConfigError, which lists the settings that are not supported.
    """
    problems = [
        f"  {key}={config[key]!r}: only {' or '.join(map(repr, values))} is supported"
        for key, values in SUPPORTED.items()
        if key in config and config[key] not in values
    ]
    if problems:
        raise ConfigError("the source's multimodal settings are not supported:\n" + "\n".join(problems))
    if layout is LANGUAGE_MODEL:
        return get_tower(given) if given else None
    if layout in (ORIGINAL, LLAVA):
        tower = _with_newline(get_tower(given) if given else _published(config), config, layout)
        said = said_of(config).get("tower") or {}
        if layout is ORIGINAL and not said:
            tower = as_the_original(tower)
        return _with_layer(tower, config.get("mm_vision_select_layer", -2))
    tower = get_tower(given) if given else _inside(config)
    if layout is NATIVE:
        return tower_with_projector(tower, config)
    drops = config.get("vision_feature_select_strategy", "default") == "default"
    tower = _with_newline(replace(tower, drop_first_feature=drops), config, layout)
    return _with_layer(tower, config.get("vision_feature_layer", -2))


def _with_newline(tower: Tower, config: dict, layout: Layout) -> Tower:
    """The tower of LLaVA-NeXT, if the config is of that. ConfigError for other grids of tiles than this program's."""
    kind = MERGES.get(config.get("model_type") or "", "next" if config.get("mm_patch_merge_type") == UNPAD else "")
    if not kind:
        return tower
    if layout is ORIGINAL:
        raise ConfigError(
            f"mm_patch_merge_type={UNPAD!r}: MoE-LLaVA's code does not tile pictures; only 'flat' is supported"
        )
    tiling, found = TILINGS[kind], config.get("image_grid_pinpoints")
    own, ratio = tiling.pinpoints(tower.image_size), config.get("vision_aspect_ratio", "anyres_max_9")
    if not isinstance(found, list) or sorted(map(list, found)) != sorted(own):
        raise ConfigError(f"image_grid_pinpoints={found!r}: only {own} is supported")
    if tiling.max_tiles and ratio != f"anyres_max_{tiling.max_tiles}":
        raise ConfigError(f"vision_aspect_ratio={ratio!r}: only 'anyres_max_{tiling.max_tiles}' is supported")
    return checked(replace(tower, newline=True, tiling=kind))


def as_the_original(tower: Tower) -> Tower:
    """MoE-LLaVA drops the first feature of every tower, also of SigLIP, where it is a patch."""
    return tower if tower.drop_first_feature else get_tower(f"{tower.name}@original")


def trained_with(config: dict, layout: Layout, model: Model, by_the_original: bool) -> dict[str, dict]:
    """What the weights were trained with, in the terms of a run (`checkpoint.description.TRAINED_WITH`).

    `by_the_original`: MoE-LLaVA's code trained the projector. A language model alone knows no images, so nothing is said.
    """
    found: dict[str, dict] = {}
    if by_the_original and model.backbone.embedding_multiplier != 1.0:
        found["model"] = {"scale_multimodal_embeddings": False}
    if layout in (ORIGINAL, LLAVA):
        found["data"] = {"template": model.backbone.template}
        if get_template(model.backbone.template).labels:
            found["data"]["label_mode"] = "original"
        if "image_aspect_ratio" in config:
            found["data"] |= _shape_of_pictures(config["image_aspect_ratio"])
        if config.get("tokenizer_model_max_length"):
            found["data"] |= {"max_sample_length": config["tokenizer_model_max_length"], "length_counts": "text"}
    if config.get("model_type") in MERGES:
        found["data"] = {"image_grid": True}
    for section, fields in said_of(config).items():
        if section in TRAINED_WITH:
            found[section] = found.get(section, {}) | fields
    return found


def _shape_of_pictures(value: str | None) -> dict:
    if value == "anyres":
        return {"image_grid": True}
    return {"image_aspect_ratio": "pad" if value == "pad" else "square"}  # the original looks for "pad" alone


def _with_layer(tower: Tower, layer: object) -> Tower:
    """Raises ConfigError for a layer that the tower lacks, and for several, whose features some models join."""
    if type(layer) is not int or not -tower.num_layers <= layer + 1 <= tower.num_layers + 1:
        raise ConfigError(
            f"the source's visual tokens are of layer {layer} (vision_feature_layer, mm_vision_select_layer); one of "
            f"{-tower.num_layers - 1} to {tower.num_layers} is supported"
        )
    return tower if layer == tower.feature_layer else replace(tower, feature_layer=layer)


def _published(config: dict) -> Tower:
    name = config.get("mm_image_tower") or config.get("mm_vision_tower")
    if not name:
        raise ConfigError("config.json has neither mm_image_tower nor mm_vision_tower; give --tower")
    if Path(name).exists():
        return get_tower(name)
    stem = name.rstrip("/").split("/")[-1]
    published = (tower for tower in TOWERS.values() if _hub_name(tower).split("/")[-1] == stem)
    tower = TOWERS.get(stem) or next(published, None)
    if tower is None:
        raise ConfigError(f"tower {name!r} is not a known one ({', '.join(TOWERS)}); give --tower a folder with it")
    return tower


def _inside(config: dict) -> Tower:
    """Of transformers' `vision_config`; the name of a published size when it is one."""
    if not isinstance(config.get("vision_config"), dict):
        raise ConfigError("config.json has no vision_config; give --tower a folder with the tower")
    tower = tower_from_hf_config(config["vision_config"], FAMILIES, name="vision_config")
    for other in TOWERS.values():
        if replace(tower, name=other.name, source=other.source) == other:
            return other
    return tower


def original_config(model: Model, source: dict, trained: dict[str, dict]) -> dict:
    """`config.json` of MoE-LLaVA: the imported one where there is one, with what the checkpoint now is.

    `trained`: what it was trained with (`checkpoint.description.trained_with`).
    """
    backbone, original = model.backbone, model.backbone.hf.original
    config = _base(model, source)
    config |= {
        "model_type": original.moe_model_type if model.moe else original.model_type,
        "architectures": [original.moe_architecture if model.moe else original.architecture],
        "mm_image_tower": source.get("mm_image_tower")
        or source.get("mm_vision_tower")
        or _hub_name(model.required_tower),
        "mm_video_tower": None,
        "mm_hidden_size": model.required_tower.hidden_size,
        "image_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": model.required_tower.feature_layer,
        "mm_vision_select_feature": "patch",
        "use_mm_proj": True,
    }
    for key, value in ORIGINAL_DEFAULTS.items():
        config.setdefault(key, value)
    config.pop("moe", None)
    if model.moe:
        config["moe"] = _moe_section(model, source.get("moe") or {}, backbone.hf.original.train_modules)
    return _with_settings(config, model, trained)


def _with_settings(config: dict, model: Model, trained: dict[str, dict]) -> dict:
    """The config with the pictures' shape, and with a key for what the layout's own code would compute otherwise."""
    data = trained.get("data", {})
    config.pop("trained_with", None)
    if "image_aspect_ratio" in data:
        config["image_aspect_ratio"] = data["image_aspect_ratio"]
    otherwise: dict[str, dict] = {}
    if said := asked_as(model, trained, trained_with(config, ORIGINAL, model, False)):
        otherwise["data"] = said
    if model.required_tower.newline:
        size = model.required_tower.image_size
        config |= {"mm_patch_merge_type": UNPAD, "image_aspect_ratio": "anyres"}
        config["image_grid_pinpoints"] = model.required_tower.tiles.pinpoints(size, wide_first=True)
    elif data.get("image_grid"):
        otherwise.setdefault("data", {})["image_grid"] = True
    if data.get("modalities"):
        otherwise.setdefault("data", {})["modalities"] = list(data["modalities"])
    if model.backbone.embedding_multiplier != 1.0 and trained.get("model", {}).get("scale_multimodal_embeddings", True):
        otherwise["model"] = {"scale_multimodal_embeddings": True}
    if not model.required_tower.drop_first_feature:
        otherwise["tower"] = {"drop_first_feature": False}
    if model.moe:
        released = _released_moe(config, config["moe"])
        fields = {
            item.name: getattr(model.moe, item.name)
            for item in dataclasses.fields(MoEConfig)
            if item.name not in RESTORED and getattr(model.moe, item.name) != getattr(released, item.name)
        }
        otherwise |= {"moe": fields} if fields else {}
    return config | ({"trained_with": otherwise} if otherwise else {})


RESTORED = (
    "placement",
    "moe_grouped_gemm",
    "moe_token_dispatcher_type",
)  # moe_layers_idx has the one; speed the others
WHY_NOT = {
    "model": "the original does not scale MiniCPM's embeddings beside images, and this model was trained with that",
    "tower": "the original leaves out the tower's first feature, and this model was trained with all",
    "data.image_grid": "the original does not tile pictures, and this model was trained with data.image_grid=true",
    "data.modalities": "the original knows no data.modalities, and this model was trained with some",
    "moe": "the original routes with its own gate, which has a capacity",
}


def notes_of(config: dict) -> list[str]:
    """What an exported config says that the original's code does not do, for a person."""
    otherwise = config.get("trained_with") or {}
    router = otherwise.get("moe", {}).get("router")
    return [
        f"{why}: its code will compute other numbers; `moellava convert import` reads trained_with in config.json"
        for (section, _, field), why in ((path.partition("."), why) for path, why in WHY_NOT.items())
        if section in otherwise and (not field or field in otherwise[section]) and (section != "moe" or router)
    ]


ORIGINAL_DEFAULTS = {
    "video_projector_type": "linear",
    "video_global_proj": False,
    "video_temproal_proj": False,  # the original's spelling
    "video_spatial_proj": False,
    "image_aspect_ratio": "pad",
    "tokenizer_padding_side": "right",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
}


def llava_config(model: Model, source: dict, trained: dict[str, dict]) -> dict:
    """`config.json` of LLaVA-1.5."""
    config = _base(model, source)
    config |= {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": source.get("mm_vision_tower")
        or source.get("mm_image_tower")
        or _hub_name(model.required_tower),
        "mm_hidden_size": model.required_tower.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": model.required_tower.feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": config.get("image_aspect_ratio", "pad"),
    }
    return _with_settings(config, model, trained)


def _base(model: Model, source: dict) -> dict:
    """The source's own config if it is flat and of the same family, else one from the backbone's fields."""
    hf = model.backbone.hf
    kinds = (hf.model_type, hf.original.model_type, hf.original.moe_model_type, *hf.aliases)
    same = source.get("model_type") in kinds and "text_config" not in source
    return dict(source) if same else hf_config_of(model.backbone)


def _hub_name(tower: Tower) -> str:
    """The published tower's name, from which the original chooses its class ("openai/...", "google/...")."""
    marker = "https://huggingface.co/"
    return "/".join(tower.source.removeprefix(marker).split("/")[:2]) if tower.source.startswith(marker) else tower.name


def _moe_section(model: Model, source: dict, train_modules: tuple[str, ...]) -> dict:
    moe, layers = model.required_moe, list(model.moe_layers)
    return source | {
        "moe_enable": True,
        "moe_mode": moe.placement if isinstance(moe.placement, str) else source.get("moe_mode", "sparse"),
        "moe_layers_idx": layers,
        "ep_size": source.get("ep_size", 1),
        "top_k_experts": moe.moe_router_topk,
        "capacity_factor": moe.moe_expert_capacity_factor or source.get("capacity_factor", 1.5),
        "eval_capacity_factor": moe.eval_capacity_factor,
        "min_capacity": moe.min_capacity,
        "use_residual": moe.use_residual,
        "router_aux_loss_coef": moe.moe_aux_loss_coeff,
        "train_modules": source.get("train_modules") or list(train_modules),
        "num_experts": [moe.num_moe_experts] * len(layers),
    }
