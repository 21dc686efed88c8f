"""A model filled from a checkpoint, or told what does not fit."""

import pytest
import torch

from megatron_moellava import parallel
from megatron_moellava.checkpoint.integrity import DamagedCheckpoint
from megatron_moellava.config import CheckpointError, MoEConfig, ParallelConfig
from megatron_moellava.model.build import build_model
from megatron_moellava.model.weights import (
    is_bookkeeping,
    load_weights,
    model_state,
    readable,
)
from tests.helpers.inference_models import tiny_checkpoint, tiny_run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("run")) / "iter_0000001"


def test_a_fresh_model_becomes_the_saved_one(saved):
    weights = []
    for seed in (2, 3):
        parallel.initialize(ParallelConfig(), seed)
        (model,) = build_model(tiny_run(MoEConfig()))
        fresh = model.projector.linear_fc1.weight.clone()
        load_weights(saved, [model])
        assert not torch.equal(model.projector.linear_fc1.weight, fresh)
        weights.append({name: value.clone() for name, value in model.named_parameters()})
    parallel.shutdown()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(
    ("moe", "backbone", "words"),
    [
        (None, "llama-tiny", ["moe.num_moe_experts 4 there, None here", "convert upcycle"]),
        (MoEConfig(num_moe_experts=2), "llama-tiny", ["moe.num_moe_experts 4 there, 2 here", "other shape"]),
        (MoEConfig(placement="dense"), "llama-tiny", ["moe.layers [0, 2] there, [0, 1, 2, 3] here"]),
        (MoEConfig(), "qwen3-tiny", ["backbone.", "missing"]),
    ],
)
def test_a_model_that_does_not_fit_is_told_every_difference(world, saved, moe, backbone, words):
    (model,) = build_model(tiny_run(moe, backbone))
    with pytest.raises(CheckpointError) as refused:
        load_weights(saved, [model])
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize("layers", ["sparse", "dense"])
def test_an_expert_bias_that_a_checkpoint_lacks_starts_at_zero_and_is_said(world, saved, capsys, layers):
    (model,) = build_model(tiny_run(MoEConfig(moe_router_enable_expert_bias=True, placement=layers)))
    for name, value in model.named_buffers():
        if name.endswith("expert_bias"):
            assert not value.any()
    if layers == "dense":  # what does not fit for another reason is said as before
        with pytest.raises(CheckpointError, match="layers"):
            load_weights(saved, [model])
        return
    load_weights(saved, [model])
    biases = [value for name, value in model.named_buffers() if name.endswith("expert_bias")]
    assert len(biases) == 2 and not any(value.any() for value in biases)
    assert "no expert biases" in capsys.readouterr().out


def test_bookkeeping_of_transformer_engine_is_no_weight(world):
    assert is_bookkeeping("a.b._extra_state") and is_bookkeeping("a._extra_state3")
    assert not is_bookkeeping("a._extra_state.weight") and not is_bookkeeping("a.weight")
    names = model_state(build_model(tiny_run(MoEConfig())))
    assert names and not any(is_bookkeeping(name) for name in names)
    assert all(name.startswith("chunk0.") for name in names)


def test_only_what_files_can_cause_is_called_damage(tmp_path):
    for error in (EOFError("end"), RuntimeError("PytorchStreamReader failed")):
        with pytest.raises(DamagedCheckpoint, match=r"cannot be read .*; copy it anew"), readable(tmp_path):
            raise error
    with pytest.raises(RuntimeError, match="out of memory"), readable(tmp_path):
        raise RuntimeError("out of memory")
