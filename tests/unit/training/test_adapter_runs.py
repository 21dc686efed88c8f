"""A run with adapters: small checkpoints that need their base, go on where they stopped, and answer when merged."""

from pathlib import Path

import pytest
import torch

from megatron_moellava import parallel
from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import CheckpointError, ConfigError, ParallelConfig
from megatron_moellava.conversion.adapter_exports import export_adapter
from megatron_moellava.conversion.average import take_average
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.inspection import inspect
from megatron_moellava.conversion.merge import merge_adapter
from megatron_moellava.inference.load import load_model
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.training.optimizer import distributed_optimizers
from megatron_moellava.training.weight_average import averages_in_place
from tests.helpers.batches import words
from tests.helpers.inference_models import TOKENIZER, tiny_checkpoint
from tests.helpers.process_groups import release_groups
from tests.helpers.trainers import started, state

MORE = {"training.lora.rank": 2, "data.tokenizer": str(TOKENIZER), "data.template": "v1", "training.stage": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, and an adapter of two steps."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny_checkpoint(folder / "base")
    tiny_checkpoint(folder / "other", "dense")
    parallel.initialize(ParallelConfig(), 1)
    trainer = run(folder)
    for _ in range(2):
        assert trainer.step()[1]
    trainer.save()
    yield folder
    parallel.shutdown()
    release_groups()


def run(folder: Path, **more):
    settings = {"checkpoint.load": str(folder / "base"), "checkpoint.save": str(folder / "run")}
    return started(("router",), "padded", **settings | MORE | more)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_checkpoint_holds_what_was_trained_and_names_its_base(folder):
    base, adapter = (require_checkpoint(folder / name) for name in ("base", "run"))
    description = read_description(adapter)
    assert description.adapter["base"] == {"folder": str(base), "seal": read_description(base).checksum}
    assert description.adapter["lora"]["rank"] == 2
    assert size(adapter) < size(base) / 2
    table = inspect(folder / "run")
    assert "rank 2" in table and "adapters.language_model.decoder.layers" in table and "word_embeddings" not in table


def test_the_same_command_goes_on_with_the_same_numbers(folder):
    resumed = run(folder)
    assert resumed.state.iteration == 2
    once = run(folder, **{"checkpoint.save": str(folder / "once")})
    for _ in range(3):
        once.step()
    resumed.loader = once.loader
    resumed.loader._step = 2
    resumed.loader._iterator = resumed.loader._batches()
    resumed.step()
    one, two = state(once), state(resumed)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert any(name.startswith("adapters.") and value.any() for name, value in one.items())


def test_the_trained_adapter_may_be_the_start_of_another_run(folder):
    trainer = run(folder, **{"checkpoint.load": str(folder / "run"), "checkpoint.save": str(folder / "second")})
    assert trainer.state.iteration == 0
    assert trainer.state.base["folder"] == str(require_checkpoint(folder / "base"))
    assert all(p.any() for name, p in trainer.chunks[0].adapters.named_parameters() if not name.endswith(".a"))


def test_another_base_is_refused_before_a_weight_is_touched(folder):
    with pytest.raises(ConfigError, match="is another checkpoint"):
        run(folder, **{"checkpoint.load": str(folder / "other")})
    with pytest.raises(CheckpointError, match=r"is an adapter of .* is another checkpoint"):
        merge_adapter(folder / "run", save=folder / "of_another", base=folder / "other")
    assert not (folder / "of_another").exists()


def test_inference_is_that_of_the_training_and_of_the_merged_model(folder):
    trainer = run(folder)
    batch = words()
    inputs = {name: value for name, value in model_inputs(batch).items() if name != "labels_BS"}
    merge_adapter(folder / "run", save=folder / "merged")
    models = [trainer.chunks[0], *(load_model(folder / name, precision="fp32")[0] for name in ("run", "merged"))]
    with torch.no_grad():
        beside, loaded, merged = (model.eval()(**inputs) for model in models)
    assert models[1].adapters is None
    assert (loaded - beside).abs().max() <= 1e-5 * beside.abs().max()
    assert torch.equal(loaded, merged)
    assert (
        read_description(require_checkpoint(folder / "merged")).provenance["trained_with"]["data"]["template"] == "v1"
    )


def test_conversions_of_whole_models_refuse_an_adapter(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"is an adapter and no whole model; .*moellava convert merge"):
        export_checkpoint(folder / "run", save=tmp_path / "out", layout="original")
    for convert in (merge_adapter, export_adapter):
        with pytest.raises(ConfigError, match="is a whole model and no adapter"):
            convert(folder / "base", save=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_average_of_an_adapter_is_an_adapter_of_the_same_base(folder, tmp_path):
    trainer = run(
        folder, **{"checkpoint.save": str(tmp_path / "run"), "optimizer.ema_decay": 0.5, "optimizer.lr": 1e-2}
    )
    for _ in range(3):
        assert trainer.step()[1]
    trainer.save()
    with averages_in_place(distributed_optimizers(trainer.optimizer), trainer.wrapped):
        expected = state(trainer)
    take_average(tmp_path / "run", save=tmp_path / "averaged")
    own, averaged = (read_description(require_checkpoint(tmp_path / name)) for name in ("run", "averaged"))
    assert averaged.adapter == own.adapter
    loaded = run(folder, **{"checkpoint.load": str(tmp_path / "averaged"), "checkpoint.save": str(tmp_path / "next")})
    assert all(torch.equal(value, expected[name]) for name, value in state(loaded).items())
    assert any(not torch.equal(value, expected[name]) for name, value in state(trainer).items())
