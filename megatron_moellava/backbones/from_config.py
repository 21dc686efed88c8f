"""Backbone <-> `config.json`, driven by the family's `HuggingFace` data, in both directions.

Strict: a key that is neither a field, nor a constant with the supported value, nor known to change no number, is an
error. A silent quirk in a config (another activation, a logit cap) would otherwise become a model that trains and is
wrong.
"""

import dataclasses
from dataclasses import replace

from megatron_moellava.backbones.backbone import Backbone, HuggingFace, LatentAttention, RopeScaling, YarnScaling
from megatron_moellava.backbones.experts import hf_experts_of, read_experts
from megatron_moellava.config import ConfigError, MoEConfig, from_dict
from megatron_moellava.hf_config import INERT, MULTIMODAL, wrong_numbers

# Sizes that no family can guess.
REQUIRED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


def backbone_from_hf_config(config: dict, families, *, name: str) -> Backbone:
    """The backbone that `config` describes, under `name`. ConfigError lists every unsupported key at once.

    `config` may be of the text model, of LLaVA-1.5, or of a released MoE-LLaVA model.
    """
    family = find_family(config, families)
    hf = family.SIZES[0].hf
    settings = normalised(config)
    problems = _unsupported(settings, hf)
    if problems:
        raise ConfigError(f"{name} (model_type {config.get('model_type')}) is not supported:\n" + "\n".join(problems))
    values = {hf.fields[key]: value for key, value in hf.defaults.items() if key in hf.fields}
    values |= {field: settings[key] for key, field in hf.fields.items() if settings.get(key) is not None}
    missing = [key for key, field in hf.fields.items() if field in REQUIRED and field not in values]
    if "ffn_hidden_size" not in hf.fields.values() and "intermediate_size" not in settings:
        missing.append("intermediate_size")  # of a family that reads it by itself
    if missing:
        raise ConfigError(f"{name}: config.json lacks {', '.join(missing)}; add what the published model has")
    if wrong := wrong_numbers(Backbone, values, hf.fields):
        raise ConfigError(f"{name}: config.json cannot be read:\n" + "\n".join(wrong))
    if isinstance(values.get("rope_scaling"), dict):
        values["rope_scaling"] = _rope_scaling(values["rope_scaling"])
    values.setdefault("num_query_groups", values["num_attention_heads"])
    values.setdefault("kv_channels", values["hidden_size"] // values["num_attention_heads"])
    for optional in ("rope_scaling", "sliding_window"):
        values.setdefault(optional, None)
    values |= hf.read(settings)
    if hf.experts is not None:
        values["moe"] = read_experts(settings, hf.experts, values, name)
    return replace(family.SIZES[0], name=name, source=name, **values)


def find_family(config: dict, families):
    """The family file for a config's model_type, or for its architecture where it has none (MiniCPM-2B).

    Raises ConfigError for one that is not supported.
    """
    model_type = config.get("model_type")
    if model_type is None:
        architectures = config.get("architectures") or ()
        found = next((family for family in families if family.SIZES[0].hf.architecture in architectures), None)
        if found is not None:
            return found
    for family in families:
        if model_type in _model_types(family.SIZES[0].hf):
            return family
    known = sorted(name for family in families for name in _model_types(family.SIZES[0].hf))
    raise ConfigError(f"model_type={model_type!r} is not a supported backbone; supported: {', '.join(known)}")


def _model_types(hf: HuggingFace) -> tuple[str, ...]:
    return (hf.model_type, hf.original.model_type, hf.original.moe_model_type, *hf.aliases)


def normalised(config: dict) -> dict:
    """transformers 5 nests the rotary settings in `rope_parameters`; give them their older, flat names."""
    settings = dict(config)
    rope = dict(settings.pop("rope_parameters", None) or {})
    rope_type = rope.get("rope_type", "default")
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            settings[key] = rope.pop(key)
    if rope_type != "default":
        settings["rope_scaling"] = rope
    scaling = settings.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "default":
        settings["rope_scaling"] = None
    return settings


def _unsupported(settings: dict, hf: HuggingFace) -> list[str]:
    known = INERT | MULTIMODAL | hf.fields.keys() | hf.constants.keys() | set(hf.inert)
    known |= hf.experts.keys if hf.experts is not None else set()
    problems = [
        f"  {key}={settings[key]!r}: only {value!r} is supported"
        for key, value in hf.constants.items()
        if key in settings and settings[key] != value and settings[key] is not None
    ]
    for key, value in settings.items():
        if key not in known and value not in (None, False):
            problems.append(f"  {key}={value!r}: unknown key that may change the model's numbers; remove it if not")
    windows = set(settings.get("layer_types") or ()) - {"full_attention"}
    if windows and "sliding_window" not in hf.fields:
        problems.append(f"  layer_types holds {', '.join(sorted(windows))}: only full attention is supported")
    scaling = settings.get("rope_scaling")
    if "rope_scaling" in hf.fields and isinstance(scaling, dict):
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind != "llama3":
            problems.append(f"  rope_scaling of type {kind!r}: only 'llama3' is supported; remove it for plain rotary")
    return problems


def _rope_scaling(scaling: dict) -> RopeScaling:
    return RopeScaling(**{item.name: scaling[item.name] for item in dataclasses.fields(RopeScaling)})


def hf_config_of(backbone: Backbone) -> dict:
    """The text part of a `config.json` (flat, as transformers 4 and 5 both read it): the inverse of the above."""
    hf = backbone.hf
    config = {"model_type": hf.model_type, "architectures": [hf.architecture], **hf.constants}
    for key, field in hf.fields.items():
        config[key] = getattr(backbone, field)
    scaling = config.get("rope_scaling")
    if isinstance(scaling, RopeScaling):
        config["rope_scaling"] = {"rope_type": "llama3", **dataclasses.asdict(scaling)}
    return config | hf.write(backbone) | hf_experts_of(backbone)


LATER: dict = {  # fields that most families do without, with what that means
    "moe": None,
    "qk_layernorm_spans_heads": False,
    "yarn": None,
    "multi_latent_attention": None,
}
PARTS = {  # fields that are records themselves
    "rope_scaling": RopeScaling,
    "yarn": YarnScaling,
    "multi_latent_attention": LatentAttention,
}


def backbone_fields(backbone: Backbone) -> dict:
    """JSON-able fields, for run.json: a checkpoint says itself which model it holds."""
    fields = {
        item.name: getattr(backbone, item.name)
        for item in dataclasses.fields(Backbone)
        if item.name not in ("hf", "mapping")
    }
    for later in LATER:  # earlier versions read the models of all families that they know
        if not fields[later]:
            del fields[later]
    for name in ("moe", *PARTS):
        if fields.get(name):
            fields[name] = dataclasses.asdict(fields[name])
    return {"family": backbone.hf.family, **fields}


def backbone_from_fields(fields: dict, families) -> Backbone:
    """The inverse of `backbone_fields`. ConfigError for a family of a later version."""
    values = dict(fields)
    name = values.pop("family")
    family = next((family for family in families if family.SIZES[0].hf.family == name), None)
    if family is None:
        raise ConfigError(f"family={name!r} is not known to this version; upgrade megatron-moellava")
    for part, kind in PARTS.items():
        if values.get(part):
            values[part] = kind(**values[part])
    values = {**LATER, **values}
    if values["moe"]:
        values["moe"] = from_dict(MoEConfig, values["moe"])
    return replace(family.SIZES[0], **values)
