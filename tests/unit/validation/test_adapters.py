"""What makes an adapter's function, and what a run says of it. The mistakes of users are in test_problems.py."""

from dataclasses import replace

from megatron_moellava.backbones import get_backbone
from megatron_moellava.checkpoint.description import RunDescription
from megatron_moellava.config import LoraConfig, MoEConfig
from megatron_moellava.towers import get_tower
from megatron_moellava.validation.adapters import adapter_problems, base_problems, shown
from tests.helpers.inference_models import tiny_run


def with_lora(lora: LoraConfig | None, moe: MoEConfig | None = None, **training):
    run = tiny_run(moe)
    return replace(run, training=replace(run.training, lora=lora, **training))


def problems(run) -> list[str]:
    return list(adapter_problems(run, get_backbone("llama-tiny"), get_tower("clip-tiny")))


def test_adapters_alone_are_something_to_train():
    assert problems(with_lora(LoraConfig(), trains=())) == []
    assert problems(with_lora(LoraConfig(targets=("experts",), shared_outer=True), MoEConfig())) == []


def test_dropout_is_no_part_of_the_function_and_the_rest_is():
    lora = LoraConfig(rank=4)
    assert (
        shown(lora)
        == shown(replace(lora, dropout=0.5))
        == shown(replace(lora, targets=("experts", "ffn", "attention")))
    )
    for change in ({"rank": 5}, {"alpha": 5.0}, {"use_rslora": True}, {"shared_outer": True}, {"targets": ("ffn",)}):
        assert shown(replace(lora, **change)) != shown(lora)


def test_a_whole_model_with_a_seal_is_a_base_and_an_adapter_goes_on_as_it_is():
    whole = RunDescription(iteration=1, model={}, checksum="seal")
    adapter = replace(whole, adapter={"lora": {"rank": 4}, "base": {}})
    assert list(base_problems("x", whole, with_lora(LoraConfig(rank=4)))) == []
    assert list(base_problems("x", adapter, with_lora(LoraConfig(rank=4)))) == []
    assert list(base_problems("x", replace(whole, checksum=None), with_lora(None))) == []
