"""Tiny random models of transformers -> Megatron checkpoint -> back, and to LlavaForConditionalGeneration: same numbers.

transformers is an independent implementation here: it loads what was exported and must compute what the source computes.
"""

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_moellava.backbones import BACKBONES
from megatron_moellava.config import MoEConfig
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.upcycle import upcycle_checkpoint
from tests.helpers import hf_moe_models

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY = 120
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TEXT_CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama-3.1": transformers.LlamaConfig(
        num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=LLAMA_3_ROPE, **SIZES
    ),
    "mistral": transformers.MistralConfig(num_key_value_heads=2, **SIZES),
    "phi": transformers.PhiConfig(partial_rotary_factor=0.5, **SIZES),
    "stablelm": transformers.StableLmConfig(use_qkv_bias=True, num_key_value_heads=4, **SIZES),
    "qwen2": transformers.Qwen2Config(num_key_value_heads=2, **SIZES),
    "qwen3": transformers.Qwen3Config(num_key_value_heads=2, head_dim=24, **SIZES),
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
# The same operations in the same order on both sides: measured 0 for dense models. Experts are summed in another order.
EXACT, SUMMED = 0.0, 2e-5


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Norm weights of 1 and biases of 0 would hide a lost tensor."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model.eval()


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("towers")
    models = {
        "clip": transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)),
        "siglip": transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)),
    }
    for name, model in models.items():
        randomised(model).save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


def language_model(name: str, folder) -> torch.nn.Module:
    model = randomised(transformers.AutoModelForCausalLM.from_config(TEXT_CONFIGS[name]))
    model.save_pretrained(folder)
    return model


def load(folder) -> torch.nn.Module:
    own = "auto_map" in json.loads((folder / "config.json").read_text())
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=own).eval()


def text_logits(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits[..., :VOCABULARY]


TOKENS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


UPCYCLED = {
    "moe": MoEConfig(),
    "residual": MoEConfig(use_residual=True),
    "granular": MoEConfig(num_moe_experts=8, moe_router_topk=4, moe_ffn_hidden_size=SIZES["intermediate_size"] // 2),
    "one of weight 1": MoEConfig(moe_router_topk=1, normalize_top1=True),
}


@pytest.mark.parametrize("name", TEXT_CONFIGS)
def test_dense_model_comes_back_and_runs_as_llava(tmp_path, towers, name):
    source = language_model(name, tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", save=tmp_path / "run", tower=towers["clip"], keep_output_bias=name == "phi")
    export_checkpoint(tmp_path / "run", save=tmp_path / "back", layout="language-model")
    before, after = load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(text_logits(reloaded, TOKENS), text_logits(source, TOKENS))
    export_checkpoint(tmp_path / "run", save=tmp_path / "llava", layout="transformers")
    assert (text_logits(load(tmp_path / "llava"), TOKENS) - text_logits(source, TOKENS)).abs().max() <= EXACT


@pytest.mark.parametrize("name", TEXT_CONFIGS)
@pytest.mark.parametrize("kind", UPCYCLED)
def test_upcycled_model_computes_what_the_dense_one_does(tmp_path, towers, name, kind):
    """Equal experts: whatever the router chooses, the weights sum to 1. Stock Qwen-MoE classes where they fit."""
    source = language_model(name, tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", save=tmp_path / "run", tower=towers["clip"], keep_output_bias=name == "phi")
    upcycle_checkpoint(tmp_path / "run", save=tmp_path / "moe", moe=UPCYCLED[kind])
    export_checkpoint(tmp_path / "moe", save=tmp_path / "out", layout="transformers")
    model = load(tmp_path / "out")
    stock = name not in ("phi", "stablelm") and not UPCYCLED[kind].use_residual
    assert type(model).__name__ == ("Llava" if stock else "MoELlava") + "ForConditionalGeneration"
    assert (text_logits(model, TOKENS) - text_logits(source, TOKENS)).abs().max() <= SUMMED


@pytest.mark.parametrize("name", ["mistral", "qwen3", "phi", "stablelm"])
def test_distinct_experts_are_routed_as_top_2_of_softmax(tmp_path, towers, name):
    """Experts that differ, against a mixture written out here over the MLPs of the dense model."""
    source = language_model(name, tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", save=tmp_path / "run", tower=towers["clip"], keep_output_bias=name == "phi")
    upcycle_checkpoint(tmp_path / "run", save=tmp_path / "moe", moe=MoEConfig(placement=(1,)), noise_std=0.5)
    export_checkpoint(tmp_path / "moe", save=tmp_path / "out", layout="transformers")
    export_checkpoint(tmp_path / "moe", save=tmp_path / "original", layout="original")
    weights = load_file(tmp_path / "original/model.safetensors")
    root = "model.layers.1.mlp.deepspeed_moe."
    dense = source.model.layers[1].mlp

    def mixture(hidden):
        logits = hidden @ weights[f"{root}gate.wg.weight"].T
        top, chosen = logits.topk(2, dim=-1)
        share = torch.zeros_like(logits).scatter(-1, chosen, top.softmax(-1))
        output = 0
        for number in range(4):
            prefix = f"{root}experts.deepspeed_experts.{number}."
            state = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            output = output + share[..., number : number + 1] * torch.func.functional_call(dense, state, (hidden,))
        return output

    expected_model = source
    forward = dense.forward
    with torch.no_grad():
        model = load(tmp_path / "out")
        got = text_logits(model, TOKENS)
        dense_logits = text_logits(source, TOKENS)
        captured = {}
        handle = dense.register_forward_pre_hook(lambda module, inputs: captured.update(x=inputs[0]))
        text_logits(source, TOKENS)
        handle.remove()
        wanted = mixture(captured["x"])
        dense.forward = lambda hidden: wanted
        want = text_logits(expected_model, TOKENS)
        dense.forward = forward
    assert (got - want).abs().max() <= SUMMED
    assert (got - dense_logits).abs().max() > 100 * SUMMED  # the experts do differ


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_visual_tokens_are_the_towers_through_the_projector(tmp_path, towers, name):
    language_model("qwen2", tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", save=tmp_path / "run", tower=towers[name])
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="transformers")
    export_checkpoint(tmp_path / "run", save=tmp_path / "projector", layout="projector")
    model = load(tmp_path / "out")
    tower = transformers.AutoModel.from_pretrained(towers[name]).eval()
    state = torch.load(tmp_path / "projector/mm_projector.bin", weights_only=True)
    first, second = (
        [state[f"model.mm_projector.image_spatial_proj.{n}.{part}"] for part in ("weight", "bias")] for n in (0, 2)
    )
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2][:, int(name == "clip") :]
        functional = torch.nn.functional
        want = functional.linear(functional.gelu(functional.linear(hidden, *first)), *second)
        got = model.model.get_image_features(pixels)
    got = torch.stack(list(getattr(got, "pooler_output", got)))
    assert (got.reshape(want.shape) - want).abs().max() <= SUMMED


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_what_transformers_saves_is_imported_again(tmp_path, towers, moe):
    """Version 5 names the tower's tensors differently and adds empty shared experts when it saves."""
    language_model("qwen2", tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", save=tmp_path / "run", tower=towers["clip"])
    source = tmp_path / "run"
    if moe:
        upcycle_checkpoint(source, save=tmp_path / "moe", moe=MoEConfig(placement=(0, 2)), noise_std=0.2)
        source = tmp_path / "moe"
    export_checkpoint(source, save=tmp_path / "first", layout="transformers")
    load(tmp_path / "first").save_pretrained(tmp_path / "saved")
    import_checkpoint(tmp_path / "saved", save=tmp_path / "again")
    export_checkpoint(tmp_path / "again", save=tmp_path / "second", layout="transformers")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    for name, value in first.items():
        assert torch.equal(value, second[name][: len(value)]), name


def qwen_v1(folder) -> torch.nn.Module:
    """Qwen v1 is Qwen2 with other names, a fused qkv and gate and up the other way round: made from a Qwen2 model."""
    config = transformers.Qwen2Config(num_key_value_heads=4, rms_norm_eps=1e-6, **SIZES)
    model = randomised(transformers.AutoModelForCausalLM.from_config(config))
    state, old = model.state_dict(), {}
    names = {"embed_tokens": "wte", "norm": "ln_f"}
    for short, long in names.items():
        old[f"transformer.{long}.weight"] = state[f"model.{short}.weight"]
    old["lm_head.weight"] = state["lm_head.weight"]
    for layer in range(3):
        new, prefix = f"model.layers.{layer}.", f"transformer.h.{layer}."
        for part in ("weight", "bias"):
            old[f"{prefix}attn.c_attn.{part}"] = torch.cat([state[f"{new}self_attn.{n}_proj.{part}"] for n in "qkv"])
        for long, short in {
            "attn.c_proj": "self_attn.o_proj",
            "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
            "mlp.w1": "mlp.up_proj",
            "mlp.w2": "mlp.gate_proj",
            "mlp.c_proj": "mlp.down_proj",
        }.items():
            old[f"{prefix}{long}.weight"] = state[f"{new}{short}.weight"]
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in old.items()}, folder / "model.safetensors")
    keys = {
        "model_type": "qwen",
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "kv_channels": 16,
        "vocab_size": VOCABULARY,
        "seq_length": 128,
        "layer_norm_epsilon": 1e-6,
        "no_bias": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    }
    (folder / "config.json").write_text(json.dumps(keys))
    return model


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_qwen_v1_runs_as_qwen2(tmp_path, towers, moe):
    source = qwen_v1(tmp_path / "hf")
    report = import_checkpoint(tmp_path / "hf", save=tmp_path / "run", tower=towers["clip"])
    assert report["model"].backbone.hf.family == "qwen"
    export_checkpoint(tmp_path / "run", save=tmp_path / "back", layout="language-model")
    before, after = load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    run = tmp_path / "run"
    if moe:
        upcycle_checkpoint(run, save=tmp_path / "moe", moe=MoEConfig())
        run = tmp_path / "moe"
    export_checkpoint(run, save=tmp_path / "out", layout="transformers")
    assert (text_logits(load(tmp_path / "out"), TOKENS) - text_logits(source, TOKENS)).abs().max() <= SUMMED


def test_minicpm_runs_with_its_scalings(tmp_path, towers):
    """transformers has no MiniCPM; Granite is Llama with the same scalings."""
    depth, base, layers = 1.4, 16, SIZES["num_hidden_layers"]
    config = transformers.GraniteConfig(
        embedding_multiplier=12.0,
        residual_multiplier=depth / math.sqrt(layers),
        attention_multiplier=16**-0.5,
        logits_scaling=64 / base,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        **SIZES,
    )
    source = randomised(transformers.AutoModelForCausalLM.from_config(config))
    source.save_pretrained(tmp_path / "hf")
    keys = SIZES | {
        "model_type": "minicpm",
        "scale_emb": 12,
        "scale_depth": depth,
        "dim_model_base": base,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "hf/config.json").write_text(json.dumps(keys))
    import_checkpoint(tmp_path / "hf", save=tmp_path / "run", tower=towers["clip"])
    upcycle_checkpoint(tmp_path / "run", save=tmp_path / "moe", moe=MoEConfig())
    for name in ("run", "moe"):
        export_checkpoint(tmp_path / name, save=tmp_path / f"{name}_out", layout="transformers")
        difference = text_logits(load(tmp_path / f"{name}_out"), TOKENS) - text_logits(source, TOKENS)
        assert difference.abs().max() <= SUMMED


def test_every_family_is_compared_here():
    """A new family needs a comparison with transformers, or a reason here."""
    compared = {name.split("-")[0] for name in TEXT_CONFIGS} | {"qwen", "minicpm"} | hf_moe_models.MODELS.keys()
    assert {backbone.hf.family for backbone in BACKBONES.values()} == compared
