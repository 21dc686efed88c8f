"""SigLIP 2 NaFlex against transformers: features of images of different sizes, their gradients, and pixels.

transformers pads every image to the largest and masks; here the patches of all images are one packed row.
"""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from megatron_moellava import parallel
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import ConfigError, DataConfig, MoEConfig, ParallelConfig, RunConfig, from_dict
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.inspection import diff
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from megatron_moellava.conversion.upcycle import upcycle_checkpoint
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.data.native import patches, plans
from megatron_moellava.model.build import build_model
from megatron_moellava.model.weights import load_weights
from megatron_moellava.towers import get_tower
from tests.helpers.process_groups import release_groups
from tests.parity.test_hf_conversion import TEXT_CONFIGS, randomised

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 8,
    "num_patches": 16,
}
GRIDS = (
    (2, 3),
    (6, 6),
    (1, 5),
    (2, 3),
    (4, 4),
)  # smaller than the table of positions, larger, equal, and twice the same
EXACT = 1e-4  # what is asked for; measured 2e-6


@pytest.fixture(scope="module", autouse=True)
def world():
    parallel.initialize(ParallelConfig(), seed=1)
    yield
    parallel.shutdown()
    release_groups()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> dict:
    """The tower in transformers, and the folders of it and of a language model."""
    folder = tmp_path_factory.mktemp("native")
    tower = randomised(transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**VISION)))
    tower.save_pretrained(folder / "tower")
    language = randomised(transformers.AutoModelForCausalLM.from_config(TEXT_CONFIGS["llama"]))
    language.save_pretrained(folder / "language")
    return {"tower": tower, "folder": folder}


def ours(source: dict, suffix: str = ""):
    """The imported model."""
    folder = source["folder"]
    run = folder / f"run{suffix}"
    if not run.exists():
        import_checkpoint(folder / "language", save=run, tower=f"{folder / 'tower'}{suffix}")
    tree = {
        "model": {"backbone": str(run), "tower": str(run)},
        "training": {"stage": 2, "precision": "fp32"},
    }
    (model,) = build_model(from_dict(RunConfig, tree))
    load_weights(require_checkpoint(run), [model])
    return model.eval()


def images_of(seed: int = 0) -> list[torch.Tensor]:
    """Patches [P, 3, H, W] of each image."""
    draw, side = torch.Generator().manual_seed(seed), VISION["patch_size"]
    return [torch.randn(rows * columns, 3, side, side, generator=draw) for rows, columns in GRIDS]


def theirs(tower, images: list[torch.Tensor]) -> torch.Tensor:
    """last_hidden_state of every image's own patches, one after the other."""
    longest = max(len(image) for image in images)
    flat = [image.permute(0, 2, 3, 1).flatten(1) for image in images]
    values = torch.stack([torch.nn.functional.pad(image, (0, 0, 0, longest - len(image))) for image in flat])
    mask = torch.tensor([[1] * len(image) + [0] * (longest - len(image)) for image in images])
    hidden = tower(pixel_values=values, pixel_attention_mask=mask, spatial_shapes=torch.tensor(GRIDS)).last_hidden_state
    return torch.cat([hidden[number, : len(image)] for number, image in enumerate(images)])


def test_features_and_gradients_of_mixed_grids_equal_transformers(source):
    model, images = ours(source), images_of()
    features_VD = model.vision_tower(torch.cat(images), GRIDS)
    expected_VD = theirs(source["tower"], images)
    assert features_VD.shape == expected_VD.shape
    assert (features_VD - expected_VD).abs().max() < EXACT
    weights_VD = torch.randn(expected_VD.shape, generator=torch.Generator().manual_seed(5))
    (features_VD * weights_VD).sum().backward()
    (expected_VD * weights_VD).sum().backward()
    own = model.vision_tower
    pairs = {
        "embeddings.position_embedding.weight": own.position_embeddings.weight,
        "embeddings.patch_embedding.weight": own.embedder.weight,
        "embeddings.patch_embedding.bias": own.embedder.bias,
        "encoder.layers.0.mlp.fc1.weight": own.decoder.layers[0].mlp.linear_fc1.weight,
        "encoder.layers.2.self_attn.out_proj.weight": own.decoder.layers[2].self_attention.linear_proj.weight,
        "post_layernorm.weight": own.ln_post.weight,
    }
    found = dict(source["tower"].named_parameters())
    for name, parameter in pairs.items():
        expected = found[name].grad
        assert (parameter.grad - expected).abs().max() < EXACT * expected.abs().max(), name
    source["tower"].zero_grad()


@torch.no_grad()
def test_an_image_does_not_meet_its_neighbours(source):
    model, images = ours(source), images_of()
    together = model.vision_tower(torch.cat(images), GRIDS).split([len(image) for image in images])
    for image, grid, found in zip(images, GRIDS, together, strict=True):
        assert torch.allclose(model.vision_tower(image, (grid,)), found, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["", "@pixel_shuffle"])
def test_an_export_runs_as_lfm2_vl_and_comes_back(source, suffix, tmp_path):
    """Logits of two texts with pictures, of one packed row here and of a padded batch there."""
    model = ours(source, suffix)
    run = source["folder"] / f"run{suffix}"
    report = export_checkpoint(run, save=tmp_path / "hf", layout="transformers")
    assert "Lfm2Vl" in report["layout"]
    other = transformers.Lfm2VlForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    image_id = json.loads((tmp_path / "hf/config.json").read_text())["image_token_id"]
    grids, draw = ((2, 4), (4, 6)), torch.Generator().manual_seed(3)
    images = [torch.randn(rows * columns, 3, 8, 8, generator=draw) for rows, columns in grids]
    counts = [rows * columns // model.tower.shuffle**2 for rows, columns in grids]
    words = torch.randint(3, 100, (7,), generator=draw).tolist()
    tokens = [*words[:2], *[IMAGE_TOKEN] * counts[0], *words[2:5], *[IMAGE_TOKEN] * counts[1], *words[5:]]
    tokens_BS = torch.tensor([tokens])
    found = model(tokens_BS, torch.arange(len(tokens))[None], pixels_NCHW=torch.cat(images), grids=grids)
    flat = [image.permute(0, 2, 3, 1).flatten(1) for image in images]
    longest = max(map(len, flat))
    expected = other(
        input_ids=tokens_BS.masked_fill(tokens_BS == IMAGE_TOKEN, image_id),
        pixel_values=torch.stack([torch.nn.functional.pad(image, (0, 0, 0, longest - len(image))) for image in flat]),
        pixel_attention_mask=torch.tensor([[1] * len(image) + [0] * (longest - len(image)) for image in flat]),
        spatial_shapes=torch.tensor(grids),
    ).logits
    assert (found - expected[..., : found.shape[-1]]).abs().max() < EXACT
    import_checkpoint(tmp_path / "hf", save=tmp_path / "again")
    differences, same = diff(run, tmp_path / "again")
    names = {item.name for item in differences}
    assert (
        names <= {"language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"} and same > 40
    )
    assert open_checkpoint(tmp_path / "again").model.tower.shuffle == model.tower.shuffle


@torch.no_grad()
def test_experts_are_exported_with_it(source, tmp_path):
    ours(source)
    moe = MoEConfig(num_moe_experts=4, moe_router_topk=2)
    upcycle_checkpoint(source["folder"] / "run", save=tmp_path / "moe", moe=moe, noise_std=0.5)
    export_checkpoint(tmp_path / "moe", save=tmp_path / "hf", layout="transformers")
    other = transformers.Lfm2VlForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    tree = {
        "model": {"backbone": str(tmp_path / "moe"), "tower": str(tmp_path / "moe")},
        "moe": {"num_moe_experts": 4},
        "training": {"stage": 3, "precision": "fp32"},
    }
    (model,) = build_model(from_dict(RunConfig, tree))
    load_weights(require_checkpoint(tmp_path / "moe"), [model])
    tokens_BS = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    found = model.eval()(tokens_BS, torch.arange(9).expand(2, -1))
    assert (found - other(input_ids=tokens_BS).logits[..., : found.shape[-1]]).abs().max() < EXACT


def test_the_tower_comes_back_bit_by_bit(source, tmp_path):
    ours(source)
    export_checkpoint(source["folder"] / "run", save=tmp_path / "tower", layout="tower")
    before, after = (
        load_file(source["folder"] / "tower/model.safetensors"),
        load_file(tmp_path / "tower/model.safetensors"),
    )
    assert {name.removeprefix("vision_model.") for name in after} == before.keys()
    assert all(torch.equal(before[name.removeprefix("vision_model.")], value) for name, value in after.items())
    again = transformers.Siglip2VisionModel.from_pretrained(tmp_path / "tower").eval()
    images = images_of()
    with torch.no_grad():
        assert torch.equal(theirs(again, images), theirs(source["tower"], images))


@pytest.mark.parametrize("layout", ["original", "llava"])
def test_other_layouts_say_that_they_cannot(source, layout, tmp_path):
    ours(source)
    with pytest.raises(ConfigError, match="has no native resolution; export --layout transformers"):
        export_checkpoint(source["folder"] / "run", save=tmp_path / "out", layout=layout)


@pytest.mark.parametrize("size", [(640, 480), (97, 33), (33, 411), (16, 16), (1000, 20), (1, 1)])
@pytest.mark.parametrize("budget", [16, 49, 256])
def test_pixels_equal_the_processors_to_one_level(size, budget):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    image = Image.open(buffer).convert("RGB")
    tower = replace(get_tower("siglip2-base-patch16-naflex"), max_num_patches=budget)
    (plan,) = plans([image.size], tower, DataConfig(), "row 0")
    processor = transformers.Siglip2ImageProcessorPil(max_num_patches=budget)
    expected = processor(image, return_tensors="pt")
    assert plan.grid == tuple(expected["spatial_shapes"][0].tolist()) and plan.tokens == plan.grid[0] * plan.grid[1]
    found = torch.from_numpy(patches(image, tower, plan)).permute(0, 2, 3, 1).flatten(1)
    difference = (found - expected["pixel_values"][0][: plan.tokens]).abs().max()
    assert difference <= 1.01 / 255 / 0.5
