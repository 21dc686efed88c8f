"""Reading the `config.json` of a Hugging Face folder.

The keys below are known and need no field. Any other unknown key stops a conversion.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moellava.config import ConfigError

# fmt: off
# Change no number of a forward or backward pass here: book-keeping, tokenizer ids, generation defaults, initialisation
# of weights that are loaded anyway, attention implementations and caches.
INERT = frozenset((
    "_name_or_path", "_attn_implementation", "architectures", "model_type", "transformers_version",
    "torch_dtype", "dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "initializer_range", "auto_map", "return_dict", "output_attentions", "output_hidden_states",
    "is_decoder", "is_encoder_decoder", "cross_attention_hidden_size", "add_cross_attention",
    "chunk_size_feed_forward", "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "num_beams",
    "num_beam_groups", "diversity_penalty", "early_stopping", "num_return_sequences",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "begin_suppress_tokens", "suppress_tokens",
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
    "exponential_decay_length_penalty", "remove_invalid_values", "output_scores", "return_dict_in_generate",
    "finetuning_task", "id2label", "label2id", "problem_type", "prefix", "pruned_heads", "sep_token_id",
    "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "torchscript",
    "use_bfloat16", "layer_types", "_attn_implementation_autoset",
    "max_sequence_length",  # of LLaMA-1 and Vicuna 1.3, beside max_position_embeddings
))
# What LLaVA and MoE-LLaVA add to the text model's config; `conversion.original` reads the ones that matter.
MULTIMODAL = frozenset((
    "moe", "lora", "mm_image_tower", "mm_video_tower", "mm_vision_tower", "mm_hidden_size",
    "image_projector_type", "video_projector_type", "mm_projector_type", "mm_patch_merge_type",
    "video_global_proj", "video_temproal_proj", "video_spatial_proj", "use_mm_proj",
    "mm_vision_select_layer", "mm_vision_select_feature", "image_aspect_ratio", "image_grid_pinpoints",
    "tokenizer_padding_side", "tokenizer_model_max_length", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter",
    "mm_projector_lr", "mm_use_im_start_end", "mm_use_im_patch_token", "unfreeze_mm_vision_tower",
    "mm_resampler_type", "pretrain_mm_mlp_adapter", "freeze_mm_vision_resampler", "vision_config",
    "text_config", "image_crop_resolution", "image_split_resolution", "mm_vision_tower_lr", "tune_mm_vision_resampler",
    "trained_with",  # of exports of this program
))
# fmt: on


def wrong_numbers(cls: type, values: dict, fields: Mapping[str, str]) -> list[str]:
    """What stands in a config.json where a whole number above 0, or a number, belongs.

    `values`: for fields of the dataclass `cls`; `fields`: config key -> field, for the message.
    """
    keys = {field: key for key, field in fields.items()}
    problems = []
    for item in dataclasses.fields(cls):
        value: Any = values.get(item.name)
        whole = item.type is int and not (type(value) is int and value > 0)
        real = item.type is float and (type(value) not in (int, float) or not math.isfinite(value))
        if item.name in values and (whole or real):
            kind = "a whole number above 0" if whole else "a number"
            problems.append(f"  {keys.get(item.name, item.name)}={value!r}: must be {kind}")
    return problems


def read_json(path: Path) -> dict:
    """`config.json` of a folder, or the file itself. ConfigError when it is missing or not a JSON object."""
    path = path / "config.json" if path.is_dir() else path
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give a folder with a Hugging Face config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); give a folder with a Hugging Face config.json") from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} is not a JSON object but {type(value).__name__}; give a folder with a Hugging Face config.json"
        )
    return value
