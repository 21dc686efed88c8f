"""Multi-latent attention: packed rows, and generation from latents, against whole rows. (tests/parity has transformers.)"""

import pytest
import torch

from megatron_moellava import parallel
from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import ParallelConfig
from megatron_moellava.model.build import build_model
from megatron_moellava.model.kv_cache import KVCache, Step
from megatron_moellava.model.latent_attention import halves
from tests.helpers.inference_models import scatter, tiny_run

TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=["deepseek-v2-tiny", "deepseek-v3-tiny"])
def model(request):
    parallel.initialize(ParallelConfig(), seed=1)
    (built,) = build_model(tiny_run(get_backbone(request.param).moe, request.param))
    scatter(built)
    yield built.eval()
    parallel.shutdown()


def logits_of(model, tokens_BS, lengths=None) -> torch.Tensor:
    positions_BS = torch.arange(tokens_BS.shape[1])[None]
    packed = {}
    if lengths:
        positions_BS = torch.cat([torch.arange(length) for length in lengths])[None]
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        packed = {"cu_seqlens": ends, "max_seqlen": max(lengths)}
    with torch.no_grad():
        return model(tokens_BS, positions_BS, None, torch.ones_like(tokens_BS, dtype=torch.bool), **packed)


def test_neighbouring_pairs_come_apart():
    assert halves(torch.tensor([[1, 2, 3, 4, 5, 6]])).tolist() == [[1, 3, 5, 2, 4, 6]]


@pytest.mark.parametrize("lengths", [(5, 9, 3), (270, 4)], ids=["short", "long"])
def test_the_samples_of_a_packed_row_begin_at_position_0_and_do_not_see_each_other(model, lengths):
    parts = [torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(length)) for length in lengths]
    packed = logits_of(model, torch.cat(parts, dim=1), lengths)
    alone = torch.cat([logits_of(model, part) for part in parts], dim=1)
    assert alone.std() > 0.1 and (packed - alone).abs().max() < TOLERANCE * alone.abs().max()


def test_a_cache_of_latents_gives_what_the_whole_row_gives(model):
    """A prompt beside a row that goes on: [0 1 2 3], then row 1's prompt and row 0's position 4, and so on."""
    tokens = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(3))
    expected = logits_of(model, tokens)
    cache = KVCache(max_batch_size=2, max_sequence_length=16)

    def step(prompts, decoding, places) -> torch.Tensor:
        rows, positions = zip(*places, strict=True)
        cache.begin(Step(prompts=prompts, decoding=decoding, positions_T=torch.tensor(positions)))
        with torch.no_grad():
            embedded_T1D = model.embed(tokens[list(rows), list(positions)][None], None)
            return model(None, None, embeddings_SBD=embedded_T1D, inference_context=cache)[0]

    first = step(((0, 4),), 0, [(0, position) for position in range(4)])
    second = step(((1, 3),), 1, [(1, 0), (1, 1), (1, 2), (0, 4)])
    third = step((), 2, [(0, 5), (1, 3)])
    wanted = ((first, [(0, 3)]), (second, [(1, 2), (0, 4)]), (third, [(0, 5), (1, 3)]))
    for found, places in wanted:
        there = torch.stack([expected[row, position] for row, position in places])
        assert (found - there).abs().max() < TOLERANCE * there.abs().max()
    latent = model.backbone.multi_latent_attention
    keys, values = cache.row(0)[1]
    assert keys.shape == (1, 6, latent.kv_lora_rank + latent.qk_pos_emb_head_dim) and values.numel() == 0
