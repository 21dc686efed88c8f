"""LanguageBind's video tower (arXiv 2310.01852): its image tower, whose layers first attend across the frames of a video.

At the start of each layer every row of a frame (a patch, or the class token) gets a learned embedding of its frame and
attends to the same row of the other frames; then comes CLIP's layer, frame by frame. A video is exactly as many frames as there
are such embeddings, and each frame has the visual tokens of a picture. MoE-LLaVA names the tower and leaves it disabled.

`LanguageBind_Video_merge` is `LanguageBind_Video` with its adapters merged. Of the published variants, those whose patches or
class tokens belong to frames (`clip_type: vl_new`) are not supported.
"""

from dataclasses import replace

from megatron_moellava.mapping import QKV, Mapping, both, copy
from megatron_moellava.towers.clip import HF_LAYER, LAYER
from megatron_moellava.towers.languagebind_image import HF as IMAGE
from megatron_moellava.towers.languagebind_image import LANGUAGEBIND_IMAGE

TEMPORAL = (
    copy(f"{LAYER}temporal_embedding", f"{HF_LAYER}temporal_embedding"),
    *both(Mapping, f"{LAYER}temporal_layernorm", f"{HF_LAYER}temporal_layer_norm1"),
    *both(QKV, f"{LAYER}temporal_attention.linear_qkv", *(f"{HF_LAYER}temporal_attn.{name}_proj" for name in "qkv")),
    *both(Mapping, f"{LAYER}temporal_attention.linear_proj", f"{HF_LAYER}temporal_attn.out_proj"),
)

HF = replace(
    IMAGE,
    family="languagebind_video",
    wrapper_model_type="LanguageBindVideo",
    constants={**IMAGE.constants, "add_time_attn": True, "clip_type": "vl"},
    inert=tuple(name for name in IMAGE.inert if name != "num_frames"),
    defaults={**IMAGE.defaults, "add_time_attn": False, "num_frames": 1},
    fields={"num_frames": "num_frames"},
)

LANGUAGEBIND_VIDEO = replace(
    LANGUAGEBIND_IMAGE,
    name="languagebind-video-large-patch14",
    source="https://huggingface.co/LanguageBind/LanguageBind_Video_merge/blob/main/config.json",
    resample="bilinear",
    num_frames=8,
    hf=HF,
    mapping=(*LANGUAGEBIND_IMAGE.mapping, *TEMPORAL),
)
LANGUAGEBIND_VIDEO_TINY = replace(
    LANGUAGEBIND_VIDEO,
    name="languagebind-video-tiny",
    source="this project: the tests",
    num_layers=3,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    image_size=32,
    patch_size=16,
    num_frames=4,
)
SIZES = (LANGUAGEBIND_VIDEO, LANGUAGEBIND_VIDEO_TINY)
