"""The averaged weights of a run as a checkpoint of their own, which loads like any other."""

import pytest
import torch

from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import newest_checkpoint
from megatron_moellava.commands.convert import main
from megatron_moellava.config import CheckpointError
from megatron_moellava.conversion.average import take_average
from megatron_moellava.conversion.megatron_checkpoint import check_complete, open_checkpoint
from megatron_moellava.training.optimizer import distributed_optimizers
from megatron_moellava.training.weight_average import averages_in_place
from tests.helpers.trainers import one_layout, started, state

ROLES = ("projector", "language.attention", "experts", "router")
BF16 = {"training.precision": "bf16", "optimizer.lr": 1e-2}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    with one_layout():
        yield


def trained(folder, **more):
    trainer = started(ROLES, **BF16, **more, **{"checkpoint.save": str(folder)})
    for _ in range(3):
        trainer.step()
    trainer.save()
    return trainer


def test_the_average_becomes_a_checkpoint_of_its_own(tmp_path, capsys):
    trainer = trained(tmp_path / "run", **{"optimizer.ema_decay": 0.6})
    with averages_in_place(distributed_optimizers(trainer.optimizer), trainer.wrapped):
        expected = state(trainer)
    report = take_average(tmp_path / "run", save=tmp_path / "averaged")
    assert main(["average", str(tmp_path / "run"), "--save", str(tmp_path / "again")]) == 0
    assert f"{report['averaged']} of {report['tensors']} tensors are averages" in capsys.readouterr().out
    own, averaged = (open_checkpoint(tmp_path / name) for name in ("run", "averaged"))
    check_complete(averaged)
    assert {name: tensor.dtype for name, tensor in averaged.tensors.items()} == {
        name: tensor.dtype for name, tensor in own.tensors.items()
    }
    trained_tensors = [name for name in own.tensors if not name.startswith("vision_tower")]
    assert 0 < report["averaged"] < len(trained_tensors) < report["tensors"]
    loaded = state(started(ROLES, **BF16, **{"checkpoint.load": str(tmp_path / "averaged")}))
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())
    assert not all(torch.equal(value, expected[name]) for name, value in state(trainer).items())
    provenance = read_description(newest_checkpoint(tmp_path / "averaged")).provenance
    assert provenance["operation"] == "average" and provenance["source"] == "run/iter_0000003"


def test_a_run_without_an_average_has_none_to_take(tmp_path, capsys):
    trained(tmp_path / "run")
    assert main(["average", str(tmp_path / "run"), "--save", str(tmp_path / "averaged")]) == 2
    assert "has no averaged weights" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"no averaged weights.*train with optimizer\.ema_decay"):
        take_average(tmp_path / "run", save=tmp_path / "averaged")
    assert not (tmp_path / "averaged").exists()
