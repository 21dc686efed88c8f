"""OpenAI's CLIP vision transformers: class token, LayerNorm before the first layer, quick GELU, patches without bias.

transformers spells the first norm `pre_layrnorm`. Features are hidden_states[-2] without the class token; the last
layer and `post_layernorm` are never needed.
"""

from dataclasses import replace

from megatron_moellava.mapping import QKV, Flat, Mapping, both, copy
from megatron_moellava.towers.tower import Tower, TowerHuggingFace

LAYER, HF_LAYER = "decoder.layers.{i}.", "vision_model.encoder.layers.{i}."

# The transformer block of CLIP and of SigLIP alike.
BLOCK = (
    *both(Mapping, f"{LAYER}input_layernorm", f"{HF_LAYER}layer_norm1"),
    *both(QKV, f"{LAYER}self_attention.linear_qkv", *(f"{HF_LAYER}self_attn.{name}_proj" for name in "qkv")),
    *both(Mapping, f"{LAYER}self_attention.linear_proj", f"{HF_LAYER}self_attn.out_proj"),
    *both(Mapping, f"{LAYER}pre_mlp_layernorm", f"{HF_LAYER}layer_norm2"),
    *both(Mapping, f"{LAYER}mlp.linear_fc1", f"{HF_LAYER}mlp.fc1"),
    *both(Mapping, f"{LAYER}mlp.linear_fc2", f"{HF_LAYER}mlp.fc2"),
)
MAPPING = (
    Flat("class_token", ("vision_model.embeddings.class_embedding",)),
    copy("conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    copy("position_embeddings.weight", "vision_model.embeddings.position_embedding.weight"),
    *both(Mapping, "ln_pre", "vision_model.pre_layrnorm"),
    *BLOCK,
)
UNUSED = ("encoder.layers.{i}.", "post_layernorm.")

# What transformers writes into the config of a vision model, although only the pooled output or a text model has it.
NO_PART_OF_FEATURES = ("projection_dim", "tie_word_embeddings", "vocab_size")
# A config may leave out what equals transformers' defaults: google/siglip-base-patch16-224 has no size at all.
BASE_SIZES = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "image_size": 224,
}

HF = TowerHuggingFace(
    family="clip",
    model_type="clip_vision_model",
    wrapper_model_type="clip",
    architecture="CLIPVisionModel",
    image_processor="CLIPImageProcessor",
    constants={"num_channels": 3, "attention_dropout": 0.0, "dropout": 0.0},
    inert=("initializer_factor", *NO_PART_OF_FEATURES),
    defaults={"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu", "patch_size": 32, **BASE_SIZES},
)

CLIP_L_336 = Tower(
    name="clip-vit-large-patch14-336",
    source="https://huggingface.co/openai/clip-vit-large-patch14-336/blob/main/config.json",
    num_layers=24,
    hidden_size=1024,
    ffn_hidden_size=4096,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    activation="quick_gelu",
    layernorm_epsilon=1e-5,
    class_token=True,
    pre_layernorm=True,
    patch_bias=False,
    drop_first_feature=True,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
    resize="shortest_edge_crop",
    hf=HF,
    mapping=MAPPING,
    unused=UNUSED,
)
CLIP_L_224 = replace(
    CLIP_L_336,
    name="clip-vit-large-patch14",
    source="https://huggingface.co/openai/clip-vit-large-patch14/blob/main/config.json",
    image_size=224,
)
CLIP_TINY = replace(
    CLIP_L_336,
    name="clip-tiny",
    source="this project: the quickstart and the tests",
    num_layers=3,
    hidden_size=96,
    ffn_hidden_size=384,
    num_attention_heads=4,
    image_size=72,
    patch_size=12,
)
SIZES = (CLIP_L_336, CLIP_L_224, CLIP_TINY)
