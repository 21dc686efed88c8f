"""From a checkpoint folder to an engine."""

import shutil

import pytest
import torch

from megatron_moellava import parallel
from megatron_moellava.config import (
    CheckpointError,
    ConfigError,
    ParallelConfig,
    ProjectorMoEConfig,
    TowerMoEConfig,
)
from megatron_moellava.conversion.upcycle import upcycle_checkpoint
from megatron_moellava.inference.load import inference_layout, inference_run, load_for_inference, load_model
from tests.helpers.inference_models import TOKENIZER, ask, tiny_checkpoint
from tests.helpers.paths import ASSETS


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("run"))


def run_of(saved, **said):
    return inference_run(
        saved / "iter_0000001", ParallelConfig(), **{"tokenizer": "", "template": "", "precision": ""} | said
    )


def test_what_is_not_said_is_what_the_checkpoint_was_trained_with(saved):
    run = run_of(saved)
    assert (run.data.tokenizer, run.data.template, run.training.precision) == (str(TOKENIZER), "v1", "fp32")
    assert run.moe.num_moe_experts == 4 and not run.data.packing


def test_what_is_said_wins(saved):
    run = run_of(saved, template="phi", precision="bf16")
    assert (run.data.template, run.training.precision) == ("phi", "bf16")


def test_a_bf16_checkpoint_answers_in_what_the_machine_is_fast_in(tmp_path, capfd, avx2):
    """Said once where it is not the checkpoint's own, and not at all where the user has chosen."""
    saved = tiny_checkpoint(tmp_path / "run", precision="bf16")
    found = {}
    for asked in ("", "auto", "bf16"):
        model, _ = load_model(saved, precision=asked)
        parallel.shutdown()
        found[asked] = model.config.params_dtype, capfd.readouterr().err
    for asked in ("", "auto"):
        assert found[asked][0] == torch.float32
        assert found[asked][1].startswith("precision fp32 for the bf16 checkpoint") and found[asked][1].count("\n") == 1
    assert found["bf16"][0] == torch.bfloat16 and found["bf16"][1].startswith("warning: precision bf16, but ")


def test_an_fp32_checkpoint_answers_in_fp32_everywhere(saved, capfd):
    assert run_of(saved, precision="auto").training.precision == "fp32"
    model, _ = load_model(saved)
    parallel.shutdown()
    assert model.config.params_dtype == torch.float32 and capfd.readouterr().err == ""


def test_a_missing_tokenizer_is_named_with_the_way_out(saved):
    with pytest.raises(CheckpointError, match=r"/no/where, does not exist; pass --tokenizer"):
        run_of(saved, tokenizer="/no/where")


def test_a_tokenizer_in_the_home_folder_is_found(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(ASSETS))
    assert run_of(saved, tokenizer="~/tok_bpe").data.tokenizer == "~/tok_bpe"


def test_an_engine_answers_again_the_same_from_the_same_checkpoint(saved):
    answers = []
    for _ in range(2):
        engine = load_for_inference(saved, max_batch_size=2)
        (completion,) = engine.generate([ask(0)])
        answers.append(completion.tokens)
        parallel.shutdown()
    assert answers[0] == answers[1] and len(answers[0]) > 0


def test_a_damaged_checkpoint_answers_nothing_unless_one_insists(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    run_file = tmp_path / "run/iter_0000001/ranks/generators_00000.pt"
    run_file.write_bytes(b"x" + run_file.read_bytes()[1:])
    with pytest.raises(CheckpointError, match="differs from what was written"):
        load_for_inference(tmp_path / "run", max_batch_size=2)
    assert load_for_inference(tmp_path / "run", max_batch_size=2, verify=False)
    parallel.shutdown()


def test_layouts_for_generation_cut_neither_sequence_nor_stages_into_pieces():
    assert not inference_layout(ParallelConfig(tensor_model_parallel_size=2)).sequence_parallel
    with pytest.raises(ConfigError, match="context_parallel_size must be 1"):
        inference_layout(ParallelConfig(context_parallel_size=2))


def test_upcycling_tower_and_projector_changes_no_answer(saved, tmp_path):
    """Through a checkpoint, the reader of its description and the engine, whose experts lie in one tensor."""
    vision = {"tower_moe": TowerMoEConfig(), "projector_moe": ProjectorMoEConfig(num_moe_experts=3)}
    upcycle_checkpoint(saved, save=tmp_path / "moe", moe=None, **vision)
    answers = []
    for folder in (saved, tmp_path / "moe"):
        engine = load_for_inference(folder, max_batch_size=2)
        answers.append([completion.tokens for completion in engine.generate([ask(0), ask(1, images=2)])])
        mixtures = engine.model.run.mixtures.keys()
        parallel.shutdown()
    assert mixtures == {"language", "tower", "projector"}
    assert answers[0] == answers[1] and len(answers[0][0]) > 0
