"""Adapters of `peft` that were trained elsewhere: what is read, what is refused. tests/parity/test_lora.py has the numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import CheckpointError, ConfigError
from megatron_moellava.conversion.adapter_exports import export_adapter
from megatron_moellava.conversion.adapter_imports import BESIDE, import_adapter
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from megatron_moellava.conversion.merge import merge_adapter
from tests.helpers.conversion_models import original_state, read

RANK, LAYER = 2, "base_model.model.model.layers.0"


def adapter(folder: Path, extra: dict | None = None, **config) -> Path:
    """q_proj and v_proj of the first layer, as a training of the language model alone leaves them."""
    folder.mkdir()
    weights = original_state("llama", "dense")
    tensors = {}
    for number, name in enumerate(("q_proj", "v_proj")):
        rows, columns = weights[f"model.layers.0.self_attn.{name}.weight"].shape
        generator = torch.Generator().manual_seed(number)
        tensors[f"{LAYER}.self_attn.{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        tensors[f"{LAYER}.self_attn.{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
    save_file(tensors | (extra or {}), folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 4,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


def test_what_an_adapter_leaves_out_stays_as_it_is(tmp_path, imported):
    report = import_adapter(adapter(tmp_path / "in"), base=imported, save=tmp_path / "run")
    assert report["lora"].targets == ("attention",) and report["lora"].scale == 2.0
    described = read_description(require_checkpoint(tmp_path / "run"))
    assert described.adapter["base"]["seal"] == read_description(require_checkpoint(imported)).checksum
    merge_adapter(tmp_path / "run", save=tmp_path / "merged")
    before, after = (open_checkpoint(folder).tensors for folder in (imported, tmp_path / "merged"))
    changed = {name for name, tensor in before.items() if not torch.equal(read(tensor), read(after[name]))}
    assert changed == {"language_model.decoder.layers.0.self_attention.linear_qkv.weight"}
    export_adapter(tmp_path / "run", save=tmp_path / "out")
    given, written = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("in", "out"))
    there = {name.replace("model.language_model.", "model."): value for name, value in written.items()}
    assert all(torch.equal(value, there[name]) for name, value in given.items())
    assert not any(value.any() for name, value in there.items() if name not in given)


def test_what_llava_trains_whole_lies_beside_its_adapter(tmp_path, imported):
    folder = adapter(tmp_path / "in")
    before = open_checkpoint(imported).tensors["projector.linear_fc1.bias"]
    trained = torch.arange(before.numel, dtype=torch.float)
    state = original_state("llama", "dense")
    names = [name for name in state if "mm_projector" in name]
    values = {f"base_model.model.{name}": state[name].float() for name in names}
    (bias,) = (name for name in values if name.endswith("spatial_proj.0.bias"))
    torch.save(values | {bias: trained}, folder / BESIDE)
    import_adapter(folder, base=imported, save=tmp_path / "run")
    assert torch.equal(
        read(open_checkpoint(tmp_path / "run", adapter=True).tensors["projector.linear_fc1.bias"]), trained
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora=True: only plain LoRA of one rank is read"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern="),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
    ],
)
def test_another_kind_of_adapter_is_refused(tmp_path, imported, config, message):
    with pytest.raises(ConfigError, match=r"adapter_config\.json") as error:
        import_adapter(adapter(tmp_path / "in", **config), base=imported, save=tmp_path / "run")
    assert message in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (f"{LAYER}.self_attn.other_proj.lora_A.weight", (RANK, 8), "belong to no module of it, among them"),
        (f"{LAYER}.mlp.up_proj.lora_A.weight", (RANK, 8), "up_proj.lora_A.weight: shape [2, 8], expected"),
    ],
)
def test_an_adapter_of_another_model_is_refused(tmp_path, imported, name, shape, message):
    with pytest.raises(CheckpointError) as error:
        import_adapter(adapter(tmp_path / "in", {name: torch.ones(shape)}), base=imported, save=tmp_path / "run")
    assert message in str(error.value) and not (tmp_path / "run").exists()


def test_a_folder_without_an_adapter_is_named(tmp_path, imported):
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        import_adapter(tmp_path, base=imported, save=tmp_path / "run")
    folder = adapter(tmp_path / "in")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds neither of"):
        import_adapter(folder, base=imported, save=tmp_path / "run")
