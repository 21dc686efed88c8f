"""LanguageBind's image and video towers: their published layout in, the same numbers out, and back bit by bit.

transformers has CLIP's classes, which the image tower is. It has none that attends across frames, so the video tower is
compared with what LanguageBind's own code computed (tests/golden/languagebind), and with a second implementation in plain
torch, written here from what that code computes, which also gives gradients.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from megatron_moellava import parallel
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import CheckpointError, ConfigError, ParallelConfig, RunConfig, from_dict
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.layout import ORIGINAL
from megatron_moellava.conversion.original import tower_of
from megatron_moellava.model.build import build_model
from megatron_moellava.model.weights import load_weights
from megatron_moellava.towers import get_tower
from tests.helpers.paths import REPO
from tests.helpers.process_groups import release_groups
from tests.parity.test_hf_conversion import TEXT_CONFIGS, randomised

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

GOLDEN = json.loads((REPO / "tests/golden/languagebind/video.json").read_text())
SIZES = GOLDEN["sizes"]
LAYER = "vision_model.encoder.layers.{}."
ROUNDED = 2e-5  # the recording has five digits behind the point
EXACT = 1e-5  # of features around 4; measured 4e-6
# What the checkpoints hold beside the tower, and their configs beside its sizes.
OTHERS = {"text_model.final_layer_norm.weight": (8,), "visual_projection.weight": (8, 16), "logit_scale": ()}
INERT = {
    "projection_dim": 8,
    "num_channels": 3,
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "initializer_factor": 1.0,
    "force_patch_dropout": 0.5,
    "lora_r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "num_mel_bins": 0.0,
    "target_length": 0.0,
    "video_decode_backend": "decord",
}


@pytest.fixture(scope="module", autouse=True)
def world():
    parallel.initialize(ParallelConfig(), seed=1)
    yield
    parallel.shutdown()
    release_groups()


def drawn(name: str, shape) -> np.ndarray:
    """As tests/golden/README.md says."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def shapes_of(kind: str) -> dict[str, tuple[int, ...]]:
    """Of the published tensors of a tower of these sizes."""
    width, inner, patch = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["patch_size"]
    found = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (5, width),
    }
    norms, linears = ["pre_layrnorm", "post_layernorm"], {}
    for layer in range(SIZES["num_hidden_layers"]):
        prefix = f"encoder.layers.{layer}."
        norms += [f"{prefix}layer_norm1", f"{prefix}layer_norm2"]
        attentions = ["self_attn"]
        if kind == "video":
            norms.append(f"{prefix}temporal_layer_norm1")
            attentions.append("temporal_attn")
            found[f"{prefix}temporal_embedding"] = (1, SIZES["num_frames"], width)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linears |= {f"{prefix}{attention}.{part}": (width, width) for attention in attentions}
        linears |= {f"{prefix}mlp.fc1": (inner, width), f"{prefix}mlp.fc2": (width, inner)}
    found |= {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {f"vision_model.{name}": shape for name, shape in found.items()}


def weights_of(kind: str) -> dict[str, torch.Tensor]:
    """Those of the recording."""
    found = {}
    for name, shape in shapes_of(kind).items():
        is_scale = "norm" in name.split(".")[-2] and name.endswith("weight")
        found[name] = torch.tensor(0.3 * drawn(name, shape) + is_scale, dtype=torch.float32)
    return found


def pixels() -> torch.Tensor:
    """[8, 3, 8, 8]: two videos of four frames."""
    return torch.tensor(drawn("pixels", (2, 3, 4, 8, 8)), dtype=torch.float32).transpose(1, 2).flatten(0, 1)


def attended(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    """Multi-head attention of all rows [B, S, H] to each other."""

    def linear(part: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.{part}.weight"], weights[f"{name}.{part}.bias"])

    heads = SIZES["num_attention_heads"]
    query, key, value = (linear(f"{part}_proj", x).unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv")
    scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
    return linear("out_proj", (scores @ value).transpose(1, 2).flatten(2))


def normed(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)


def reference(weights: dict, pixels_NCHW: torch.Tensor) -> torch.Tensor:
    """hidden_states[-2] [N, R, H] of the video tower: the last layer is left out."""
    embeddings = "vision_model.embeddings."
    patches = F.conv2d(pixels_NCHW, weights[f"{embeddings}patch_embedding.weight"], stride=SIZES["patch_size"])
    first = weights[f"{embeddings}class_embedding"].expand(len(pixels_NCHW), 1, -1)
    x = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)
    x = normed(weights, "vision_model.pre_layrnorm", x + weights[f"{embeddings}position_embedding.weight"])
    frames = SIZES["num_frames"]
    for layer in range(SIZES["num_hidden_layers"] - 1):
        name = LAYER.format(layer)
        rows = x.shape[1]
        x = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)  # one sequence of frames for each row
        x = x + weights[f"{name}temporal_embedding"]
        x = x + attended(weights, f"{name}temporal_attn", normed(weights, f"{name}temporal_layer_norm1", x))
        x = x.unflatten(0, (-1, rows)).transpose(1, 2).flatten(0, 1)
        x = x + attended(weights, f"{name}self_attn", normed(weights, f"{name}layer_norm1", x))
        inner = normed(weights, f"{name}layer_norm2", x)
        inner = F.gelu(F.linear(inner, weights[f"{name}mlp.fc1.weight"], weights[f"{name}mlp.fc1.bias"]))
        x = x + F.linear(inner, weights[f"{name}mlp.fc2.weight"], weights[f"{name}mlp.fc2.bias"])
    return x


def published(folder: Path, kind: str, **changed) -> Path:
    """A folder as LanguageBind publishes them."""
    folder.mkdir(parents=True)
    sizes = SIZES if kind == "video" else SIZES | {"add_time_attn": False, "num_frames": 1}
    vision = {"model_type": "clip_vision_model"} | sizes | INERT | changed
    config = {"model_type": f"LanguageBind{kind.capitalize()}", "vision_config": vision, "text_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    others = {name: torch.tensor(drawn(name, shape), dtype=torch.float32) for name, shape in OTHERS.items()}
    buffer = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    torch.save(weights_of(kind) | others | buffer, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints with each of the towers."""
    folder = tmp_path_factory.mktemp("languagebind")
    language = randomised(transformers.AutoModelForCausalLM.from_config(TEXT_CONFIGS["llama"]))
    language.save_pretrained(folder / "language")
    for kind in ("image", "video"):
        tower = published(folder / f"LanguageBind_{kind}", kind)
        import_checkpoint(folder / "language", save=folder / kind, tower=str(tower))
    return {kind: folder / kind for kind in ("image", "video", "language")}


def ours(run: Path):
    tree = {"model": {"backbone": str(run), "tower": str(run)}, "training": {"stage": 2, "precision": "fp32"}}
    (model,) = build_model(from_dict(RunConfig, tree))
    load_weights(require_checkpoint(run), [model])
    return model.eval()


@torch.no_grad()
def test_video_features_are_those_of_languagebind(imported):
    assert sorted(name.removeprefix("vision_model.") for name in shapes_of("video")) == GOLDEN["names"]
    recorded = torch.tensor(GOLDEN["hidden_states"])
    assert (reference(weights_of("video"), pixels()) - recorded).abs().max() < ROUNDED
    features_NVD = ours(imported["video"]).vision_tower(pixels())
    assert features_NVD.shape == (8, 4, 16), "the class token is left out, as of every CLIP"
    assert (features_NVD - recorded[:, 1:]).abs().max() < ROUNDED


def test_gradients_are_those_of_the_second_implementation(imported):
    model, weights = ours(imported["video"]), weights_of("video")
    for tensor in weights.values():
        tensor.requires_grad_()
    draw = torch.randn(8, 4, 16, generator=torch.Generator().manual_seed(5))
    (model.vision_tower(pixels()) * draw).sum().backward()
    (reference(weights, pixels())[:, 1:] * draw).sum().backward()
    layer, name = model.vision_tower.decoder.layers[0], LAYER.format(0)
    pairs = {
        f"{name}temporal_embedding": layer.temporal_embedding,
        f"{name}temporal_layer_norm1.weight": layer.temporal_layernorm.weight,
        f"{name}temporal_attn.out_proj.weight": layer.temporal_attention.linear_proj.weight,
        f"{name}temporal_attn.out_proj.bias": layer.temporal_attention.linear_proj.bias,
        f"{name}mlp.fc1.weight": layer.mlp.linear_fc1.weight,
        "vision_model.embeddings.patch_embedding.weight": model.vision_tower.conv1.weight,
    }
    for key, parameter in pairs.items():
        expected = weights[key].grad
        assert (parameter.grad - expected).abs().max() < EXACT * expected.abs().max(), key
    qkv = torch.cat([weights[f"{name}temporal_attn.{part}_proj.weight"].grad for part in "qkv"])
    found = layer.temporal_attention.linear_qkv.weight.grad  # query, key and value of each head in turn
    found = found.unflatten(0, (SIZES["num_attention_heads"], 3, -1)).transpose(0, 1).flatten(0, 2)
    assert (found - qkv).abs().max() < EXACT * qkv.abs().max()


@torch.no_grad()
def test_frames_meet_those_of_their_own_video(imported):
    tower, videos = ours(imported["video"]).vision_tower, pixels()
    together = tower(videos)
    assert torch.allclose(tower(videos[:4]), together[:4], atol=EXACT), "the other video is not seen"
    changed = videos.clone()
    changed[3] += 1.0
    difference = (tower(changed) - together).abs().amax(dim=(1, 2))
    assert (difference[:4] > 0.01).all() and (difference[4:] == 0).all()
    assert (tower(videos[[1, 0, 2, 3]])[1] - together[0]).abs().max() > 0.01, "which frame it is matters"
    with pytest.raises(ValueError, match="6 images are no videos of 4 frames"):
        tower(videos[:6])


@torch.no_grad()
def test_image_features_are_those_of_clip_with_an_exact_gelu(imported):
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    config = transformers.CLIPVisionConfig(hidden_act="gelu", **{key: SIZES[key] for key in keys})
    clip = transformers.CLIPVisionModel(config).eval()
    names = {name.removeprefix("vision_model."): tensor for name, tensor in weights_of("image").items()}
    missing, unexpected = clip.load_state_dict(
        {key: names[key.removeprefix("vision_model.")] for key in clip.state_dict() if "position_ids" not in key},
        strict=False,
    )
    assert not unexpected and all("position_ids" in key for key in missing)
    expected_NRD = clip(pixels(), output_hidden_states=True).hidden_states[-2]
    assert (ours(imported["image"]).vision_tower(pixels()) - expected_NRD[:, 1:]).abs().max() < EXACT


@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_tower_goes_back_bit_by_bit_into_its_own_layout(imported, kind, tmp_path):
    export_checkpoint(imported[kind], save=tmp_path / "tower", layout="tower")
    tensors, expected = load_file(tmp_path / "tower/model.safetensors"), weights_of(kind)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    config = json.loads((tmp_path / "tower/config.json").read_text())
    assert config["model_type"] == f"LanguageBind{kind.capitalize()}"
    own = SIZES if kind == "video" else {"hidden_act": "gelu"}
    assert own.items() <= config["vision_config"].items()
    again = get_tower(str(tmp_path / "tower"))
    assert (again.num_frames, again.hf.family) == ((4, 1)[kind == "image"], f"languagebind_{kind}")


@pytest.mark.parametrize("layout", ["original", "llava", "transformers"])
def test_layouts_without_such_a_tower_say_so(imported, layout, tmp_path):
    with pytest.raises(ConfigError, match="has no tower that attends across the frames of a video; export"):
        export_checkpoint(imported["video"], save=tmp_path / "out", layout=layout)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clip_type": "vl_new"}, "clip_type='vl_new': only 'vl' is supported"),
        ({"add_time_attn": False}, "add_time_attn=False: only True is supported"),
        ({"num_frames": 0}, "num_frames"),
        ({"tube_size": 2}, "tube_size=2: unknown key"),
    ],
)
def test_other_variants_are_refused(changed, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        get_tower(str(published(tmp_path / "tower", "video", **changed)))


def test_unmerged_adapters_are_refused(imported, tmp_path):
    folder = published(tmp_path / "tower", "video", lora_r=16)
    weights = {
        name.replace("encoder.", "encoder.base_model.model.").replace(
            "temporal_attn.q_proj.", "temporal_attn.q_proj.base_layer."
        ): tensor
        for name, tensor in weights_of("video").items()
    }
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises((CheckpointError, ConfigError), match="base_model"):
        import_checkpoint(imported["language"], save=tmp_path / "run", tower=str(folder))


def test_what_moe_llava_calls_the_image_tower_is_known():
    """Its config names towers as they are published."""
    found = tower_of({"mm_image_tower": "LanguageBind/LanguageBind_Image", "mm_video_tower": None}, ORIGINAL, None)
    assert found == get_tower("languagebind-image-large-patch14")
    assert tower_of({"mm_image_tower": "openai/clip-vit-large-patch14-336"}, ORIGINAL, None).name.endswith("-336")
    with pytest.raises(ConfigError, match="tower 'LanguageBind/LanguageBind_Depth' is not a known one"):
        tower_of({"mm_image_tower": "LanguageBind/LanguageBind_Depth"}, ORIGINAL, None)
