"""LanguageBind's image tower (arXiv 2310.01852): CLIP ViT-L/14 by OpenCLIP, with an exact GELU.

Its checkpoint holds image and text tower together, and its `config.json` has a model_type of its own around a CLIP
`vision_config`. MoE-LLaVA names it as a tower and leaves it disabled. (The checkpoints of depth and thermal pictures hold
unmerged adapters.)
"""

from dataclasses import replace

from megatron_moellava.towers.clip import CLIP_L_224
from megatron_moellava.towers.clip import HF as CLIP

# What its code reads in training alone, or for sounds: dropped patches, adapters, mel spectra, the video decoder.
NO_PART_OF_FEATURES = (
    *("force_patch_dropout", "lora_r", "lora_alpha", "lora_dropout"),
    *("num_mel_bins", "target_length", "video_decode_backend"),
)
HF = replace(
    CLIP,
    family="languagebind_image",
    wrapper_model_type="LanguageBindImage",
    inert=(*CLIP.inert, *NO_PART_OF_FEATURES, "num_frames"),
    is_wrapped=True,
)

LANGUAGEBIND_IMAGE = replace(
    CLIP_L_224,
    name="languagebind-image-large-patch14",
    source="https://huggingface.co/LanguageBind/LanguageBind_Image/blob/main/config.json",
    activation="gelu",
    hf=HF,
)
SIZES = (LANGUAGEBIND_IMAGE,)
