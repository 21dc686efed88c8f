"""A training step asks the device for the gradient norm and for nothing else: each question would stop the host."""

import traceback
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_moellava
from megatron_moellava import parallel
from megatron_moellava.config import LoggingConfig, MoEConfig, ParallelConfig
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.training.loop import Trainer
from tests.helpers.batches import Repeated, words
from tests.helpers.inference_models import tiny_run

OURS = megatron_moellava.__path__[0]


class Reads(TorchDispatchMode):
    """Who turns tensors into numbers of the host (`float(x)`, `int(x)`, `bool(x)`): "file:line" of the nearest code
    outside torch, for each time."""

    def __init__(self):
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            frames = [frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            self.places.append(f"{frames[-1].filename}:{frames[-1].lineno}")
        return function(*arguments, **(options or {}))


def trainer(moe: MoEConfig | None) -> Trainer:
    parallel.initialize(ParallelConfig(), 1)
    run = tiny_run(moe)
    run = replace(
        run,
        training=replace(run.training, micro_batch_size=2, global_batch_size=4),
        logging=LoggingConfig(tensorboard=False),
    )
    return Trainer(run, Repeated([words()]), 3)


@pytest.mark.parametrize(
    "moe", [None, MoEConfig(), MoEConfig(moe_z_loss_coeff=0.01)], ids=["dense", "experts", "z loss"]
)
def test_a_step_reads_the_gradient_norm_alone(moe):
    started = trainer(moe)
    started.step()
    with Reads() as reads:
        numbers, applied, _ = started.step()
    assert applied and numbers["loss"] > 0 and ("load_balancing_loss" in numbers) == (moe is not None)
    assert any("clip_grads" in place for place in reads.places), "the one that decides about skipping the step"
    assert [place for place in reads.places if place.startswith(OURS)] == []


def test_the_model_takes_the_batchs_word_for_its_image_rows():
    batch = words()
    model = trainer(None).chunks[0]
    with Reads() as reads:
        model(**model_inputs(batch))
    assert [place for place in reads.places if place.startswith(OURS)] == []
    features_NFD = torch.zeros(1, model.tower.num_features, model.config.hidden_size)
    with pytest.raises(ValueError, match=r"5 placeholder rows for \d+ visual tokens of 1 images"):
        model.embed(batch.tokens_BS, None, features_NFD, image_rows=5)
    with pytest.raises(ValueError, match=r"0 placeholder rows for \d+ visual tokens of 1 images"):
        model.embed(batch.tokens_BS, None, features_NFD)
