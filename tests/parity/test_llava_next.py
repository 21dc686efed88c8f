"""LLaVA-NeXT against transformers: tiles put together without their padding, each line ended by a learned row."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_moellava import parallel
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import ConfigError, ParallelConfig, RunConfig, from_dict
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.inspection import diff
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.data.tiling import NEXT, plan
from megatron_moellava.model.build import build_model
from megatron_moellava.model.weights import load_weights
from megatron_moellava.towers import TILINGS
from tests.helpers.process_groups import release_groups
from tests.parity.test_hf_conversion import TEXT_CONFIGS, VISION, randomised

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SIZE = VISION["image_size"]
PINPOINTS = NEXT.pinpoints(SIZE)
PICTURES = ((50, 30), (28, 84), (31, 31), (90, 41))  # width, height
EXACT = 1e-4  # measured 1e-6


@pytest.fixture(scope="module", autouse=True)
def world():
    parallel.initialize(ParallelConfig(), seed=1)
    yield
    parallel.shutdown()
    release_groups()


def config_of(text: str = "llama", **changes):
    return transformers.LlavaNextConfig(
        text_config=TEXT_CONFIGS[text],
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=119,
        image_grid_pinpoints=PINPOINTS,
        **changes,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(the model in transformers, its folder, the folder of the imported run)"""
    folder = tmp_path_factory.mktemp("next")
    model = randomised(transformers.LlavaNextForConditionalGeneration(config_of()))
    model.save_pretrained(folder / "hf")
    import_checkpoint(folder / "hf", save=folder / "run")
    return model, folder / "hf", folder / "run"


def ours(run):
    tree = {
        "model": {"backbone": str(run), "tower": str(run)},
        "training": {"stage": 2, "precision": "fp32"},
    }
    (model,) = build_model(from_dict(RunConfig, tree))
    load_weights(require_checkpoint(run), [model])
    return model.eval()


def assert_same(before, after) -> None:
    """Every tensor bit by bit; exports have "vision_model.", as version 4 of transformers writes it."""
    there = load_file(before / "model.safetensors")
    here = {
        name.replace(".vision_model.", "."): value for name, value in load_file(after / "model.safetensors").items()
    }
    assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in there)


@torch.no_grad()
def test_logits_of_tiled_pictures_equal_transformers(source):
    other, _, run = source
    model, draw = ours(run), torch.Generator().manual_seed(0)
    plans = [plan(size, model.tower) for size in PICTURES]
    tiles = [torch.randn(1 + made.grid[0] * made.grid[1], 3, SIZE, SIZE, generator=draw) for made in plans]
    words = torch.randint(3, 100, (len(PICTURES), 4), generator=draw).tolist()
    tokens = [token for own, made in zip(words, plans, strict=True) for token in [*own, *[IMAGE_TOKEN] * made.tokens]]
    tokens_BS = torch.tensor([[*tokens, 7, 8]])
    found = model(
        tokens_BS,
        torch.arange(tokens_BS.shape[1])[None],
        pixels_NCHW=torch.cat(tiles),
        grids=tuple(made.grid for made in plans),
    )
    most = max(map(len, tiles))
    padded = [torch.nn.functional.pad(own, (0, 0, 0, 0, 0, 0, 0, most - len(own))) for own in tiles]
    expected = other(
        input_ids=tokens_BS.masked_fill(tokens_BS == IMAGE_TOKEN, 119),
        pixel_values=torch.stack(padded),
        image_sizes=torch.tensor([[height, width] for width, height in PICTURES]),
    ).logits
    assert (found - expected).abs().max() < EXACT


def test_the_import_says_tiles_and_the_export_is_bit_equal(source, tmp_path):
    other, folder, run = source
    read = open_checkpoint(run)
    assert read.model.tower.newline
    assert read.run.provenance["trained_with"]["data"]["image_grid"] is True
    export_checkpoint(run, save=tmp_path / "back", layout="transformers")
    assert_same(folder, tmp_path / "back")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["model_type"] == "llava_next" and config["image_grid_pinpoints"] == PINPOINTS
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "back").eval()
    assert isinstance(again, transformers.LlavaNextForConditionalGeneration)
    assert torch.equal(again.model.image_newline, other.model.image_newline)
    processor = json.loads((tmp_path / "back/preprocessor_config.json").read_text())
    assert processor["image_processor_type"] == "LlavaNextImageProcessor"
    assert processor["image_grid_pinpoints"] == PINPOINTS


def test_other_grids_of_tiles_are_refused(tmp_path):
    model = randomised(transformers.LlavaNextForConditionalGeneration(config_of()))
    model.config.image_grid_pinpoints = PINPOINTS[:2]
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(ConfigError, match="image_grid_pinpoints"):
        import_checkpoint(tmp_path / "hf", save=tmp_path / "run")


@torch.no_grad()
def test_llava_onevision_equals_transformers_and_comes_back(tmp_path):
    """More grids, all of SigLIP's features, and very many of them interpolated."""
    vision = transformers.SiglipVisionConfig(**VISION)
    config = transformers.LlavaOnevisionConfig(
        text_config=TEXT_CONFIGS["qwen2"],
        vision_config=vision,
        image_token_index=119,
        video_token_index=118,
        image_grid_pinpoints=TILINGS["onevision"].pinpoints(SIZE),
    )
    other = randomised(transformers.LlavaOnevisionForConditionalGeneration(config))
    other.save_pretrained(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", save=tmp_path / "run")
    model, draw = ours(tmp_path / "run"), torch.Generator().manual_seed(0)
    assert model.tower.tiling == "onevision" and model.tower.feature_layer == -1
    sizes = ((28 * 5, 28 * 6), (31, 31))
    plans = [plan(size, model.tower) for size in sizes]
    assert len(plans[0].grid) == 6, "reduced"
    tiles = [torch.randn(1 + made.grid[0] * made.grid[1], 3, SIZE, SIZE, generator=draw) for made in plans]
    tokens_BS = torch.tensor([[3, *[IMAGE_TOKEN] * plans[0].tokens, 5, 6, *[IMAGE_TOKEN] * plans[1].tokens, 7]])
    found = model(
        tokens_BS,
        torch.arange(tokens_BS.shape[1])[None],
        pixels_NCHW=torch.cat(tiles),
        grids=tuple(made.grid for made in plans),
    )
    most = max(map(len, tiles))
    padded = [torch.nn.functional.pad(own, (0, 0, 0, 0, 0, 0, 0, most - len(own))) for own in tiles]
    expected = other(
        input_ids=tokens_BS.masked_fill(tokens_BS == IMAGE_TOKEN, 119),
        pixel_values=torch.stack(padded),
        image_sizes=torch.tensor([[height, width] for width, height in sizes]),
    ).logits
    assert (found - expected).abs().max() < EXACT
    export_checkpoint(tmp_path / "run", save=tmp_path / "back", layout="transformers")
    assert_same(tmp_path / "hf", tmp_path / "back")
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "back")
    assert isinstance(again, transformers.LlavaOnevisionForConditionalGeneration)


def test_llavas_own_layout_says_it_too(source, tmp_path):
    """`spatial_unpad` in config.json, `model.image_newline` among the weights, pairs with the width first."""
    _, _, run = source
    export_checkpoint(run, save=tmp_path / "out", layout="llava")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["mm_patch_merge_type"], config["image_aspect_ratio"]) == ("spatial_unpad", "anyres")
    assert config["image_grid_pinpoints"] == NEXT.pinpoints(SIZE, wide_first=True)
    assert "model.image_newline" in load_file(tmp_path / "out/model.safetensors")
    import_checkpoint(tmp_path / "out", save=tmp_path / "again", tower=str(run))
    again = open_checkpoint(tmp_path / "again")
    assert again.model.tower.newline and again.run.provenance["trained_with"]["data"]["image_grid"] is True
    assert diff(run, tmp_path / "again")[0] == []
    with pytest.raises(ConfigError, match="MoE-LLaVA's code puts no tiles together"):
        export_checkpoint(run, save=tmp_path / "original", layout="original")


def test_a_projector_alone_keeps_its_end_of_line(source, tmp_path):
    _, _, run = source
    export_checkpoint(run, save=tmp_path / "stage1", layout="projector")
    export_checkpoint(run, save=tmp_path / "language", layout="language-model")
    export_checkpoint(run, save=tmp_path / "tower", layout="tower")
    projector = tmp_path / "stage1/mm_projector.bin"
    import_checkpoint(
        tmp_path / "language", save=tmp_path / "again", tower=f"{tmp_path / 'tower'}@newline", projector=projector
    )
    assert diff(run, tmp_path / "again")[0] == []
