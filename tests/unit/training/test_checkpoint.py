"""Checkpoints of a training run: what is in them, which are kept, which is continued. Layouts are in tests/distributed."""

from dataclasses import replace

import pytest
import torch

from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import TRACKER
from megatron_moellava.config import CheckpointError, MoEConfig
from megatron_moellava.model.build import build_model
from megatron_moellava.training.checkpoint import (
    TrainingState,
    load_rank_state,
    newest_intact,
    provenance_of,
    save_checkpoint,
)
from tests.helpers.inference_models import tiny_run

RUN = tiny_run(MoEConfig())


@pytest.fixture
def chunks(world):
    return build_model(RUN)


def save(folder, chunks, iteration: int, **options):
    state = TrainingState(iteration=iteration, consumed_samples=8 * iteration, data={"position": iteration})
    return save_checkpoint(folder, RUN, chunks, state, **options)


def test_a_checkpoint_describes_its_run_and_its_files(chunks, tmp_path):
    path = save(tmp_path, chunks, 3)
    assert path == tmp_path / "iter_0000003" and (tmp_path / TRACKER).read_text() == "3\n"
    described = read_description(path)
    assert (described.iteration, described.stage, described.consumed_samples, described.world_size) == (3, 3, 24, 1)
    assert described.optimizer_steps is None, "there was no optimizer"
    assert described.model["backbone"] == "llama-tiny" and described.model["moe"]["num_moe_experts"] == 4
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert set(described.sha256) == files - {"run.json"}
    assert not list(tmp_path.glob("*.tmp"))


def test_only_the_newest_are_kept_and_leftovers_go(chunks, tmp_path):
    (tmp_path / "iter_0000009.tmp").mkdir()
    for iteration in (1, 2, 3):
        save(tmp_path, chunks, iteration, keep=2)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000003"]


def test_generators_and_data_position_come_back(chunks, tmp_path):
    path = save(tmp_path, chunks, 1)
    expected = torch.rand(3)
    torch.rand(100)
    states = load_rank_state(path, read_description(path))
    assert states == {0: {"position": 1}}
    assert torch.equal(torch.rand(3), expected)


def test_a_lost_data_position_is_an_error_not_a_new_start(chunks, tmp_path):
    path = save(tmp_path, chunks, 1)
    (path / "ranks/data_00000.pt").unlink()
    with pytest.raises(CheckpointError, match="the data position is lost"):
        load_rank_state(path, read_description(path))


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_continued(chunks, tmp_path):
    for iteration in (1, 2):
        save(tmp_path, chunks, iteration)
    file = tmp_path / "iter_0000002/ranks/data_00000.pt"
    file.write_bytes(file.read_bytes()[:-1])
    said: list[str] = []
    assert newest_intact(tmp_path, said.append) == tmp_path / "iter_0000001"
    assert "data_00000.pt" in said[0] and (tmp_path / "iter_0000002.damaged").exists()
    (tmp_path / "iter_0000001/run.json").write_text("{")
    with pytest.raises(CheckpointError, match="all checkpoints are damaged"):
        newest_intact(tmp_path, said.append)
    assert newest_intact(tmp_path / "none", said.append) is None


def test_a_folder_that_cannot_be_written_says_so(chunks, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        CheckpointError, match=r"cannot write the checkpoint .*MiB are free there; rank 0: .*starts anew"
    ):
        save(tmp_path / "file/run", chunks, 1)


def test_weights_say_what_they_were_made_of(chunks, tmp_path):
    path = save(tmp_path, chunks, 1)
    told = provenance_of(replace(RUN, training=replace(RUN.training, stage=3)), path)
    assert told["operation"] == "training of stage 3" and told["source"].endswith("/iter_0000001")
