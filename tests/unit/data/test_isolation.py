"""Samples that share a row do not know of each other: through the whole model, experts included.

Three proofs. A sample's loss is the same in a packed row as alone. A change of one sample's text or pixels leaves the
losses of the others as they are, to the last bit. The gradient of a sample's loss by any other sample's embeddings is
exactly zero, which no rounding can hide.
"""

import dataclasses
import itertools

import pytest
import torch

from megatron_moellava import parallel
from megatron_moellava.config import ModelConfig, MoEConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_moellava.data.batch import Batch
from megatron_moellava.model.build import build_model
from megatron_moellava.model.inputs import model_inputs
from tests.helpers.data_files import ASSETS, config, make_loader, make_set, take
from tests.helpers.inference_models import scatter

SEQ_LENGTH = 448
COUNT = 40
# fp32 losses of about 5 to 60: rows of another shape are summed in another order. Measured: 2e-6, relative.
TOLERANCE = 1e-5
MODELS = {
    "dense": None,
    "experts": MoEConfig(moe_aux_loss_coeff=0.0),  # the balancing loss is of the micro-batch, not of a sample
}


def build(kind: str):
    parallel.initialize(ParallelConfig(), 1)
    run = RunConfig(
        model=ModelConfig(backbone="llama-tiny", tower=str(ASSETS / "openai/clip-tiny")),
        moe=MODELS[kind],
        training=TrainingConfig(stage=3 if MODELS[kind] else 2, precision="fp32"),
    )
    (model,) = build_model(run)
    scatter(model)
    return model.train()


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("set"), COUNT)


@pytest.fixture(scope="module")
def packed(data_set) -> list[Batch]:
    loader = make_loader(config(data_set, seq_length=SEQ_LENGTH))
    batches = [batch for batch in take(loader, loader.rows_per_epoch()) if len(batch.sample_ids) >= 2]
    batches = sorted(batches, key=lambda batch: -len(batch.pixel_values_NCHW))[:8]
    assert sum(len(batch.pixel_values_NCHW) > 1 for batch in batches) >= 2
    return batches


def spans(batch: Batch) -> list[tuple[str, int, int]]:
    """(id, start, end) of every sample of a packed row, without the pad tail."""
    bounds = itertools.pairwise(batch.cu_seqlens.tolist())
    return [(name, *bound) for name, bound in zip(batch.sample_ids, bounds, strict=False)]


def losses_of(model, batch: Batch) -> list[tuple[str, torch.Tensor]]:
    """(id, summed loss) of each sample."""
    losses_BS = model(**model_inputs(batch))
    if batch.cu_seqlens is None:
        return list(zip(batch.sample_ids, losses_BS.sum(dim=1), strict=True))
    return [(name, losses_BS[0, start:end].sum()) for name, start, end in spans(batch)]


def edited(batch: Batch, sample: int, part: str) -> Batch:
    """The row with another text, or other pixels, in one sample."""
    _, start, end = spans(batch)[sample]
    tokens_BS, pixels_NCHW = batch.tokens_BS.clone(), batch.pixel_values_NCHW.clone()
    own = torch.arange(start, end)
    if part == "text":
        own = own[tokens_BS[0, own] >= 0]
        tokens_BS[0, own] = (tokens_BS[0, own] + 7) % 400
    else:
        pixels_NCHW[image_of(batch, sample)] += 1.5
    return dataclasses.replace(batch, tokens_BS=tokens_BS, pixel_values_NCHW=pixels_NCHW)


def image_of(batch: Batch, sample: int) -> int:
    """Which image of the row belongs to a sample that has one."""
    starts = [start for _, start, _ in spans(batch)]
    return int((batch.tokens_BS[0, : starts[sample]] == -200).sum()) // 16


def has_image(batch: Batch, sample: int) -> bool:
    _, start, end = spans(batch)[sample]
    return bool((batch.tokens_BS[0, start:end] == -200).any())


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_a_samples_loss_is_the_same_packed_and_unpacked(model, data_set, packed, micro_batch_size):
    loader = make_loader(config(data_set, packing=False), micro_batch_size=micro_batch_size)
    with torch.no_grad():
        alone = dict(itertools.chain(*(losses_of(model, batch) for batch in take(loader, COUNT // micro_batch_size))))
        together = dict(itertools.chain(*(losses_of(model, batch) for batch in packed)))
    assert len(alone) == COUNT and together.keys() <= alone.keys() and len(together) >= 20
    for name, loss in together.items():
        assert loss.item() > 1 and loss.item() == pytest.approx(alone[name].item(), rel=TOLERANCE), name


@pytest.mark.parametrize("part", ["text", "pixels"])
def test_no_other_samples_loss_changes_by_a_bit(model, packed, part):
    tried = {True: 0, False: 0}  # rows whose changed sample comes first, or later
    with torch.no_grad():
        for batch, sample in itertools.product(packed[:2], range(2)):
            if sample >= len(batch.sample_ids) or (part == "pixels" and not has_image(batch, sample)):
                continue
            before, after = (losses_of(model, row) for row in (batch, edited(batch, sample, part)))
            for index, ((name, old), (_, new)) in enumerate(zip(before, after, strict=True)):
                assert (old.item() != new.item()) if index == sample else (old.item() == new.item()), (name, index)
            tried[sample == 0] += 1
    assert tried[True] and tried[False]


@pytest.mark.parametrize("sample", [0, 1])
def test_gradients_end_at_the_samples_bounds(model, packed, sample):
    for batch in packed[:2]:
        embeddings_SBD = model.embed(batch.tokens_BS, batch.pixel_values_NCHW).detach().requires_grad_()
        losses_BS = model(**model_inputs(batch) | {"embeddings_SBD": embeddings_SBD, "pixels_NCHW": None})
        _, start, end = spans(batch)[sample]
        losses_BS[0, start:end].sum().backward()
        reached = embeddings_SBD.grad[:, 0].abs().sum(dim=1).nonzero().flatten()
        assert len(reached) > 10 and start <= reached.min() and reached.max() < end


def test_the_tests_above_would_see_a_leak(packed):
    """Without the bounds of its samples the row is one long text."""
    model = build("experts")
    open_row = dataclasses.replace(packed[0], cu_seqlens=torch.tensor([0, SEQ_LENGTH], dtype=torch.int32))
    open_row.max_seqlen = SEQ_LENGTH
    with torch.no_grad():
        before, after = (model(**model_inputs(row)) for row in (open_row, edited_open(open_row, packed[0])))
    _, start, end = spans(packed[0])[1]
    assert (before[0, start:end] != after[0, start:end]).any()


def edited_open(open_row: Batch, row: Batch) -> Batch:
    return dataclasses.replace(open_row, tokens_BS=edited(row, 0, "text").tokens_BS)
