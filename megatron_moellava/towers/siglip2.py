"""Google's SigLIP 2 NaFlex (arXiv 2502.14786): SigLIP at the picture's own shape, patches as one packed row.

The checkpoints of fixed resolution are SigLIP's (`siglip.py`); transformers reads these as `siglip2_vision_model`. Patches
are flattened before they are embedded, the square table of positions is resized to each picture's grid (bilinear, with
anti-aliasing), and features are those after the last norm, as transformers' models on this tower (Lfm2Vl) take them.
"""

from dataclasses import replace

from megatron_moellava.mapping import Mapping, both, copy
from megatron_moellava.towers.clip import BASE_SIZES, BLOCK, NO_PART_OF_FEATURES
from megatron_moellava.towers.siglip import SIGLIP_SO400M_384
from megatron_moellava.towers.tower import TowerHuggingFace

MAPPING = (
    *both(Mapping, "embedder", "vision_model.embeddings.patch_embedding"),
    copy("position_embeddings.weight", "vision_model.embeddings.position_embedding.weight"),
    *BLOCK,
    *both(Mapping, "ln_post", "vision_model.post_layernorm"),
)
UNUSED = ("encoder.layers.{i}.", "head.")

HF = TowerHuggingFace(
    family="siglip2",
    model_type="siglip2_vision_model",
    wrapper_model_type="siglip2",
    architecture="Siglip2VisionModel",
    image_processor="Siglip2ImageProcessor",
    constants={"num_channels": 3, "attention_dropout": 0.0},
    inert=("vision_use_head", *NO_PART_OF_FEATURES),
    defaults={
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
        "patch_size": 16,
        "num_patches": 256,
        **{key: value for key, value in BASE_SIZES.items() if key != "image_size"},
    },
    counts_patches=True,
)

NAFLEX_SO400M = replace(
    SIGLIP_SO400M_384,
    name="siglip2-so400m-patch16-naflex",
    source="https://huggingface.co/google/siglip2-so400m-patch16-naflex/blob/main/config.json",
    image_size=256,
    patch_size=16,
    feature_layer=-1,
    resample="bilinear",
    native=True,
    post_layernorm=True,
    hf=HF,
    mapping=MAPPING,
    unused=UNUSED,
)
NAFLEX_BASE = replace(
    NAFLEX_SO400M,
    name="siglip2-base-patch16-naflex",
    source="https://huggingface.co/google/siglip2-base-patch16-naflex/blob/main/config.json",
    num_layers=12,
    hidden_size=768,
    ffn_hidden_size=3072,
    num_attention_heads=12,
)
NAFLEX_TINY = replace(
    NAFLEX_SO400M,
    name="naflex-tiny",
    source="this project: the tests",
    num_layers=3,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    image_size=64,
    patch_size=16,
)
SIZES = (NAFLEX_SO400M, NAFLEX_BASE, NAFLEX_TINY)
