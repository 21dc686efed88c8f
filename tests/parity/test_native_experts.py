"""Language models with experts of their own: transformers -> import -> engine -> export -> transformers, all the same."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_moellava import parallel
from megatron_moellava.backbones import get_backbone
from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import ConfigError
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.inspection import inspect
from megatron_moellava.conversion.upcycle import upcycle_checkpoint
from megatron_moellava.conversion.upcycle_request import request
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.inference.engine import Engine
from megatron_moellava.inference.load import load_model
from megatron_moellava.inference.prompts import Prompt
from megatron_moellava.inference.requests import Request, Sampling
from megatron_moellava.validation.run import load_run
from tests.helpers.conversion_models import TOWER
from tests.helpers.hf_models import randomised
from tests.helpers.hf_moe_models import MODELS, deepseek_v3, dots1, saved
from tests.helpers.inference_models import TOKENIZER

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

FEATURES, SIZE, VOCABULARY = 16, 28, 96
TEXT = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
ROW = torch.cat([TEXT[:, :4], torch.full((1, FEATURES), IMAGE_TOKEN), TEXT[:, 4:]], dim=1)
TOLERANCE = 2e-5  # of logits whose spread is above 1; experts are summed in another order
NEW_TOKENS = 6


@pytest.fixture(scope="module", params=MODELS)
def imported(request, tmp_path_factory):
    """(name, folder): the model as transformers saves it in `hf`, imported in `run`, and both exports."""
    folder = tmp_path_factory.mktemp("native")
    saved(request.param, folder / "hf")
    import_checkpoint(folder / "hf", save=folder / "run", tower=str(TOWER))
    export_checkpoint(folder / "run", save=folder / "back", layout="language-model")
    export_checkpoint(folder / "run", save=folder / "llava", layout="transformers")
    return request.param, folder


@pytest.fixture(scope="module")
def engine(imported):
    """The engine over the import, with the fast decoder for single tokens."""
    model, prompter = load_model(imported[1] / "run", tokenizer=str(TOKENIZER), template="v1", precision="fp32")
    yield Engine(model, prompter, max_batch_size=2, max_sequence_length=64)
    parallel.shutdown()


def exported(folder):
    """transformers' model of an export; DeepSeekMoE has no class there, and brings its code."""
    own = "auto_map" in json.loads((folder / "config.json").read_text())
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=own).eval()


def logits_of(engine, tokens, pixels) -> torch.Tensor:
    positions, real = torch.arange(tokens.shape[1])[None], torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        return engine.model.eval()(tokens, positions, None, real, pixels)


def same(left, right) -> None:
    assert left.std() > 0.1
    assert (left - right).abs().max() < TOLERANCE * max(1.0, float(left.abs().max()))


def test_it_is_the_start_of_stage_1_and_describes_its_experts(imported):
    name, folder = imported
    description = read_description(require_checkpoint(folder / "run"))
    assert description.stage == 0 and description.model["backbone_fields"]["family"] == name
    run = load_run(flags={"checkpoint.load": str(folder / "run"), "training.stage": 1})
    config = json.loads((folder / "hf/config.json").read_text())
    assert run.moe.moe_router_topk == config["num_experts_per_tok"]
    coefficients = [config[key] for key in ("router_aux_loss_coef", "aux_loss_alpha") if key in config]
    assert [run.moe.moe_aux_loss_coeff] * len(coefficients) == coefficients
    assert "activated per token" in inspect(folder / "run") and "activated per token" in inspect(folder / "hf")


def test_the_language_model_comes_back_byte_by_byte(imported):
    name, folder = imported
    before, after = (load_file(folder / part / "model.safetensors") for part in ("hf", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((folder / part / "config.json").read_text()) for part in ("hf", "back")]
    if name != "deepseek_moe":
        there, here = (
            transformers.AutoModelForCausalLM.from_pretrained(folder / part).eval() for part in ("hf", "back")
        )
        with torch.no_grad():
            assert torch.equal(there(input_ids=TEXT).logits, here(input_ids=TEXT).logits)
    experts = get_backbone(str(folder / "run")).hf.experts
    keys = experts.keys & configs[0].keys() - set(experts.layers.keys)  # layers can be said in several ways
    assert {key: configs[0][key] for key in keys} == {key: configs[1][key] for key in keys}


def test_transformers_computes_the_vision_language_model(imported, engine):
    name, folder = imported
    config = json.loads((folder / "llava/config.json").read_text())
    model = exported(folder / "llava")
    assert type(model).__name__ == ("MoELlava" if name == "deepseek_moe" else "Llava") + "ForConditionalGeneration"
    for tokens, pixels in ((ROW, PIXELS), (TEXT, None)):
        ids = tokens.masked_fill(tokens == IMAGE_TOKEN, config["image_token_index"])
        with torch.no_grad():
            theirs = model(input_ids=ids, pixel_values=pixels).logits[..., :VOCABULARY]
        same(logits_of(engine, tokens, pixels), theirs)


def test_generation_is_that_of_transformers(imported, engine):
    model = randomised(MODELS[imported[0]]())
    prompts = [
        torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(length)) for length in (5, 9, 13)
    ]
    for number, ids in enumerate(prompts):
        prompt = Prompt(tokens=ids.tolist(), pixels_NCHW=None, tiles=())
        engine.submit(Request(id=str(number), turns=(), sampling=Sampling(max_new_tokens=NEW_TOKENS)), prompt)
    found = {}
    while engine.busy:
        found |= {e.request_id: list(e.completion.tokens) for e in engine.step() if e.completion is not None}
    for number, ids in enumerate(prompts):
        whole = model.generate(
            input_ids=ids[None], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        assert found[str(number)] == whole[0, len(ids) :].tolist()
    assert max(map(len, found.values())) == NEW_TOKENS


def test_the_vision_language_model_is_imported_again(imported, tmp_path):
    name, folder = imported
    if name == "deepseek_moe":
        with pytest.raises(ConfigError, match="is an export with a modelling file"):
            import_checkpoint(folder / "llava", save=tmp_path / "again")
        return
    import_checkpoint(folder / "llava", save=tmp_path / "again")
    export_checkpoint(tmp_path / "again", save=tmp_path / "second", layout="transformers")
    first, second = (load_file(path / "model.safetensors") for path in (folder / "llava", tmp_path / "second"))
    for key, value in first.items():
        assert torch.equal(value, second[key][: len(value)]), key


def test_the_originals_layout_is_refused_but_for_the_projector(imported, tmp_path):
    _, folder = imported
    export_checkpoint(folder / "run", save=tmp_path / "projector", layout="projector")
    file = tmp_path / "projector/mm_projector.bin"
    import_checkpoint(folder / "hf", save=tmp_path / "again", tower=str(TOWER), projector=file)
    assert read_description(require_checkpoint(tmp_path / "again")).stage == 1
    with pytest.raises(ConfigError, match="whose own models have experts; export --layout transformers"):
        export_checkpoint(folder / "run", save=tmp_path / "out", layout="original")


def test_more_experts_and_choices_leave_the_function_as_it_is(imported, engine, tmp_path):
    """Old experts and their router rows are repeated; what the family fixes cannot be changed on the way."""
    _, folder = imported
    own = engine.model.run.moe
    asked = {"num_experts": 2 * own.num_moe_experts, "topk": 2 * own.moe_router_topk}
    moe = request(folder / "run", **asked, placement=None, residual=False)
    if own.moe_router_num_groups:
        with pytest.raises(ConfigError, match="it cannot grow"):
            upcycle_checkpoint(folder / "run", save=tmp_path / "grown", moe=moe)
        return
    upcycle_checkpoint(folder / "run", save=tmp_path / "grown", moe=moe)
    export_checkpoint(tmp_path / "grown", save=tmp_path / "out", layout="transformers")
    with torch.no_grad():
        same(logits_of(engine, TEXT, None), exported(tmp_path / "out")(input_ids=TEXT).logits[..., :VOCABULARY])
    for option in ({"expert_bias": not own.moe_router_enable_expert_bias}, {"residual": True}):
        changed = request(folder / "run", **asked, placement=None, **({"residual": False} | option))
        if changed != moe:
            with pytest.raises(ConfigError, match="has experts of its own"):
                upcycle_checkpoint(folder / "run", save=tmp_path / "x", moe=changed)


def test_biases_grow_with_their_experts(tmp_path):
    """In proportion to the choices they are repeated, and the function stays; beside the old choices new ones start at zero."""
    model = randomised(dots1(n_group=1, topk_group=1))
    model.save_pretrained(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", save=tmp_path / "run", tower=str(TOWER))
    biases = {}
    for name, topk in (("twice", 8), ("beside", 4)):
        moe = request(tmp_path / "run", num_experts=16, topk=topk, placement=None, residual=False)
        upcycle_checkpoint(tmp_path / "run", save=tmp_path / name, moe=moe)
        export_checkpoint(tmp_path / name, save=tmp_path / f"{name}_out", layout="language-model")
        biases[name] = load_file(tmp_path / f"{name}_out/model.safetensors")[
            "model.layers.1.mlp.gate.e_score_correction_bias"
        ]
    old = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert torch.equal(biases["twice"], old.repeat(2))
    assert torch.equal(biases["beside"], torch.cat([old, torch.zeros(8)]))
    grown = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "twice_out").eval()
    with torch.no_grad():
        same(model(input_ids=TEXT).logits, grown(input_ids=TEXT).logits)


def test_layers_that_predict_ahead_are_left_out_and_latents_may_be_of_keys_alone(tmp_path):
    """Moonlight's shape of DeepSeek-V3: no latent of queries, no scaling, no groups, its epsilon; with an MTP layer behind."""
    options = {"q_lora_rank": None, "yarn": False, "epsilon": 1e-2, "n_group": 1, "topk_group": 1}
    model = randomised(deepseek_v3(**options))
    model.save_pretrained(tmp_path / "hf")
    weights = tmp_path / "hf/model.safetensors"
    ahead = {f"model.layers.4.{name}": torch.ones(4, 4) for name in ("eh_proj.weight", "mlp.gate.weight")}
    save_file(load_file(weights) | ahead, weights, metadata={"format": "pt"})
    report = import_checkpoint(tmp_path / "hf", save=tmp_path / "run", tower=str(TOWER))
    assert report["dropped"]["they predict further tokens ahead (MTP)"] == sorted(ahead)
    loaded, _ = load_model(tmp_path / "run", tokenizer=str(TOKENIZER), template="v1", precision="fp32")
    positions, real = torch.arange(TEXT.shape[1])[None], torch.ones_like(TEXT, dtype=torch.bool)
    with torch.no_grad():
        same(loaded.eval()(TEXT, positions, None, real), model(input_ids=TEXT).logits)
    parallel.shutdown()


def test_a_16_bit_release_is_trained_with_a_router_in_fp32(tmp_path):
    """Router rows are stored in the release's precision, and widened when they are read."""
    model = saved("qwen2_moe", tmp_path / "fp32").bfloat16()
    model.save_pretrained(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", save=tmp_path / "run", tower=str(TOWER), dtype="bfloat16")
    loaded, _ = load_model(tmp_path / "run", tokenizer=str(TOKENIZER), template="v1", precision="bf16")
    router = loaded.language_model.decoder.layers[0].mlp.router.weight
    assert router.dtype == torch.float32
    assert torch.equal(router.bfloat16(), model.model.layers[0].mlp.gate.weight)
    gate = loaded.language_model.decoder.layers[0].mlp.shared_experts.gate_weight
    assert gate.dtype == torch.bfloat16 and torch.equal(gate, model.model.layers[0].mlp.shared_expert_gate.weight)
    parallel.shutdown()
