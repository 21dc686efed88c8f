"""import -> engine -> export -> transformers: the same logits, for every family and every layout that a source can have.

Rows with an image and rows without one are compared, since MiniCPM's embeddings depend on that.
"""

import json

import pytest
import torch
import transformers

from megatron_moellava import parallel
from megatron_moellava.config import ConfigError, MoEConfig
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.upcycle import upcycle_checkpoint
from megatron_moellava.conversion.upcycle_request import request
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.inference.load import load_model
from megatron_moellava.training.checkpoint import TrainingState, save_checkpoint
from megatron_moellava.validation.run import load_run
from tests.helpers.conversion_models import TOWER
from tests.helpers.hf_models import BUILDERS
from tests.helpers.inference_models import TOKENIZER

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

FEATURES, SIZE = 16, 28  # of the tower
TEXT = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
ROW = torch.cat([TEXT[:, :4], torch.full((1, FEATURES), IMAGE_TOKEN), TEXT[:, 4:]], dim=1)
TOLERANCE = 2e-5  # of logits whose spread is above 1; experts are summed in another order
FAMILIES = [name for name in BUILDERS if name != "qwen2_moe"]
ROWS = {"image": (ROW, PIXELS), "text": (TEXT, None)}


def engine_logits(folder, **said) -> dict[str, torch.Tensor]:
    """What chat, serve, evaluate and analyze compute of a checkpoint."""
    model, _ = load_model(folder, tokenizer=str(TOKENIZER), template="v1", precision="fp32", **said)
    model.eval()
    found = {}
    with torch.no_grad():
        for name, (tokens, pixels) in ROWS.items():
            positions, real = torch.arange(tokens.shape[1])[None], torch.ones_like(tokens, dtype=torch.bool)
            found[name] = model(tokens, positions, None, real, pixels)
    parallel.shutdown()
    return found


def transformers_logits(folder) -> dict[str, torch.Tensor]:
    config = json.loads((folder / "config.json").read_text())
    own = "auto_map" in config
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=own).eval()
    found = {}
    with torch.no_grad():
        for name, (tokens, pixels) in ROWS.items():
            ids = tokens.masked_fill(tokens == IMAGE_TOKEN, config["image_token_index"])
            found[name] = model(input_ids=ids, pixel_values=pixels).logits[..., :96]
    return found


def assert_equal(left: dict, right: dict) -> None:
    for name, logits in left.items():
        assert logits.std() > 0.1, name
        assert (logits - right[name]).abs().max() < TOLERANCE * max(1.0, float(logits.abs().max())), name


def rewrite(folder, change) -> None:
    """Another config.json, as someone else's code would have written it, so without digests."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    (folder / "SHA256SUMS").unlink(missing_ok=True)


def released(tmp_path, family: str, moe: bool):
    """A folder as MoE-LLaVA releases it: its layout, and nothing in config.json that its code does not write."""
    BUILDERS[family](tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", save=tmp_path / "start", tower=str(TOWER))
    start = tmp_path / "start"
    if moe:
        upcycle_checkpoint(start, save=tmp_path / "upcycled", moe=MoEConfig(), noise_std=0.5)
        start = tmp_path / "upcycled"
    export_checkpoint(start, save=tmp_path / "release", layout="original")
    rewrite(tmp_path / "release", lambda config: config.pop("trained_with", None))
    if moe:  # nothing is dropped, as in the exports
        rewrite(tmp_path / "release", lambda config: config["moe"].update(eval_capacity_factor=8.0))
    return tmp_path / "release"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_with_a_tower(tmp_path, family):
    BUILDERS[family](tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", save=tmp_path / "run", tower=str(TOWER))
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="transformers")
    engine = engine_logits(tmp_path / "run")
    assert_equal(engine, transformers_logits(tmp_path / "out"))
    export_checkpoint(tmp_path / "run", save=tmp_path / "original", layout="original")
    import_checkpoint(tmp_path / "original", save=tmp_path / "again", tower=str(TOWER))
    assert_equal(engine, engine_logits(tmp_path / "again"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_release(tmp_path, family):
    import_checkpoint(released(tmp_path, family, moe=False), save=tmp_path / "run", tower=str(TOWER))
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="transformers")
    assert_equal(engine_logits(tmp_path / "run"), transformers_logits(tmp_path / "out"))


@pytest.mark.parametrize("family", ["phi", "stablelm", "qwen", "mistral", "minicpm"])
def test_a_release_with_experts(tmp_path, family):
    import_checkpoint(released(tmp_path, family, moe=True), save=tmp_path / "run", tower=str(TOWER))
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="transformers")
    exact = engine_logits(tmp_path / "run", overrides=["moe.second_choice=deterministic"])
    assert_equal(exact, transformers_logits(tmp_path / "out"))


def test_minicpms_release_is_not_scaled_beside_images_anywhere(tmp_path):
    """The switch survives upcycling, and text alone is scaled on both sides."""
    import_checkpoint(released(tmp_path, "minicpm", moe=False), save=tmp_path / "run", tower=str(TOWER))
    upcycle_checkpoint(tmp_path / "run", save=tmp_path / "moe", moe=MoEConfig())
    plain, upcycled = engine_logits(tmp_path / "run"), engine_logits(tmp_path / "moe")
    scaled = engine_logits(tmp_path / "run", overrides=["model.scale_multimodal_embeddings=true"])
    assert_equal(plain, upcycled)
    assert torch.equal(scaled["text"], plain["text"])
    assert (scaled["image"] - plain["image"]).abs().max() > 0.1
    for name, scales in (("run", False), ("moe", False), ("start", True)):
        run = load_run(flags={"checkpoint.load": str(tmp_path / name), "training.stage": 3})
        assert run.model.scale_multimodal_embeddings is scales  # the next stage trains as the one before
    for name, expected in (("run", 1.0), ("start", 12)):
        export_checkpoint(tmp_path / name, save=tmp_path / f"{name}_out", layout="transformers")
        config = json.loads((tmp_path / f"{name}_out/config.json").read_text())
        assert config["text_config"]["embedding_multiplier"] == expected
    report = export_checkpoint(tmp_path / "start", save=tmp_path / "said", layout="original")
    assert "does not scale MiniCPM's embeddings" in report["notes"][0]


def test_generation_remembers_that_the_text_began_with_images(tmp_path):
    import_checkpoint(released(tmp_path, "minicpm", moe=False), save=tmp_path / "run", tower=str(TOWER))
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="transformers")
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    ids = ROW.masked_fill(ROW == IMAGE_TOKEN, model.config.image_token_id)
    for pixels, start in ((PIXELS, ids), (None, TEXT)):
        grown = model.generate(input_ids=start, pixel_values=pixels, max_new_tokens=4, do_sample=False)
        with torch.no_grad():
            whole = model(input_ids=grown[:, :-1], pixel_values=pixels).logits[:, start.shape[1] - 1 :, :96]
        assert whole.argmax(-1).tolist() == grown[:, start.shape[1] :].tolist()


OPTIONS = {
    "shared": MoEConfig(moe_shared_expert_intermediate_size=96),
    "bias": MoEConfig(moe_router_enable_expert_bias=True),
    "both": MoEConfig(moe_shared_expert_intermediate_size=96, moe_router_enable_expert_bias=True),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", ["llama", "qwen", "qwen3"])
def test_options_of_upcycling_leave_the_function_as_it_is(tmp_path, family, option):
    """Then with experts that differ and biases that are not zero: the engine and the export agree."""
    BUILDERS[family](tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", save=tmp_path / "dense", tower=str(TOWER))
    upcycle_checkpoint(tmp_path / "dense", save=tmp_path / "moe", moe=OPTIONS[option])
    assert_equal(engine_logits(tmp_path / "dense"), engine_logits(tmp_path / "moe"))
    upcycle_checkpoint(tmp_path / "dense", save=tmp_path / "other", moe=OPTIONS[option], noise_std=0.5)
    biased = with_biases(tmp_path / "other", tmp_path / "biased")
    export_checkpoint(biased, save=tmp_path / "out", layout="transformers", tower=TOWER)
    assert_equal(engine_logits(biased), transformers_logits(tmp_path / "out"))
    with pytest.raises(ConfigError, match="export --layout transformers"):
        export_checkpoint(biased, save=tmp_path / "original", layout="original", tower=TOWER)


def with_biases(folder, save):
    """The checkpoint as a run saves it, with expert biases that change which experts are chosen."""
    model, _ = load_model(folder, tokenizer=str(TOKENIZER), template="v1", precision="fp32")
    generator = torch.Generator().manual_seed(3)
    for name, value in model.named_buffers():
        if name.endswith("expert_bias"):
            value.copy_(torch.randn(value.shape, generator=generator))
    save_checkpoint(save, model.run, [model], TrainingState(iteration=1, consumed_samples=0, data=None))
    parallel.shutdown()
    return save


@pytest.mark.parametrize("option", OPTIONS)
def test_options_can_be_switched_on_for_a_release_with_experts(tmp_path, option):
    """A shared expert that starts at zero changes nothing; with a bias the scores are other ones, the weights sum to 1."""
    release = released(tmp_path, "llama", moe=True)
    import_checkpoint(release, save=tmp_path / "run", tower=str(TOWER))
    flags = {"expert_bias": option != "shared", "shared_expert": option != "bias"}
    moe = request(tmp_path / "run", num_experts=4, topk=None, placement=None, residual=False, **flags)
    upcycle_checkpoint(tmp_path / "run", save=tmp_path / "grown", moe=moe)
    said = ["moe.second_choice=deterministic"]
    before = engine_logits(tmp_path / "run", overrides=said)
    after = engine_logits(tmp_path / "grown", overrides=said if option == "shared" else [])
    if option == "shared":
        assert_equal(before, after)
    else:
        assert moe.router == "megatron" and (before["text"] - after["text"]).abs().max() > 0.01


def test_what_no_stock_class_computes_is_refused(tmp_path):
    BUILDERS["llama"](tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", save=tmp_path / "start", tower=str(TOWER))
    export_checkpoint(tmp_path / "start", save=tmp_path / "tiled", layout="original")
    rewrite(tmp_path / "tiled", lambda config: config.update(image_aspect_ratio="anyres"))
    import_checkpoint(tmp_path / "tiled", save=tmp_path / "run", tower=str(TOWER))
    with pytest.raises(ConfigError, match="image_grid"):
        export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="transformers")
