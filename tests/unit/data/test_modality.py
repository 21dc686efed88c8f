"""The modality-length sampler against its specification (section 4.5)."""

import json

import numpy as np
import pytest
import torch

from megatron_moellava.config import DataError
from megatron_moellava.data.modality import epoch_order
from tests.helpers.data_files import config, conversation, make_loader, make_set, row, take, write_images, write_rows


def order(lengths, batch=4, chunks=3, seed=0):
    return epoch_order(np.array(lengths), batch, chunks, torch.Generator().manual_seed(seed))


def mixed(images=50, texts=31, seed=0):
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(1, 90, images), *-rng.integers(1, 90, texts)]
    rng.shuffle(lengths)
    return np.array(lengths)


def by_the_book(lengths, batch_size, chunks, generator):
    """The specification, step by step, without sharing code."""
    size = batch_size * chunks

    def grouped(subset):
        permuted = [subset[i] for i in torch.randperm(len(subset), generator=generator).tolist()]
        result = []
        for start in range(0, len(permuted), size):
            mega = sorted(permuted[start : start + size], key=lambda i: abs(lengths[i]), reverse=True)
            parts = [[] for _ in range(chunks)]
            if len(mega) % chunks:
                parts = [mega[i::chunks] for i in range(chunks)]
            else:
                for index in mega:
                    open_parts = [p for p in parts if len(p) < len(mega) // chunks]
                    min(open_parts, key=lambda p: sum(abs(lengths[i]) for i in p)).append(index)
            result.append([i for part in parts for i in part])
        return result

    image = grouped([i for i, length in enumerate(lengths) if length > 0])
    text = grouped([i for i, length in enumerate(lengths) if length < 0])
    full = image[:-1] + text[:-1]
    full = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
    return [i for mega in full for i in mega] + sorted(image[-1] + text[-1])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("images, texts", [(50, 31), (48, 24), (13, 70), (5, 5)])
def test_order_equals_the_specification(images, texts, seed):
    lengths = mixed(images, texts, seed)
    expected = by_the_book(lengths.tolist(), 4, 3, torch.Generator().manual_seed(seed))
    assert order(lengths, seed=seed) == expected


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "seed, lengths, batch, chunks, images_only, text_only",
    [
        (
            0,
            [
                170,
                129,
                104,
                57,
                65,
                12,
                19,
                8,
                39,
                163,
                131,
                182,
                103,
                123,
                194,
                147,
                128,
                111,
                114,
                187,
                59,
                164,
                135,
                5,
            ],
            *(2, 3),
            [2, 7, 12, 5, 20, 3, 19, 4, 22, 17, 1, 13, 11, 8, 9, 18, 10, 16, 14, 23, 0, 6, 21, 15],
            [7, 5, 3, 20, 12, 2, 4, 17, 13, 1, 22, 19, 8, 18, 16, 10, 9, 11, 23, 6, 15, 21, 0, 14],
        ),
        (
            1,
            [97, 104, 152, 190, 11, 33, 165, 189, 53, 65, 174, 87, 58, 166, 55, 84, 130, 112, 21, 10, 173, 151, 168],
            *(2, 4),
            [20, 4, 22, 12, 13, 9, 6, 11, 3, 19, 7, 18, 2, 0, 16, 1, 10, 14, 21, 8, 17, 5, 15],
            [4, 12, 9, 11, 6, 13, 22, 20, 19, 18, 0, 1, 16, 2, 7, 3, 5, 17, 8, 21, 14, 10, 15],
        ),
    ],
)
def test_one_modality_has_the_order_of_the_original(seed, lengths, batch, chunks, images_only, text_only, sign):
    """What the original's `get_length_grouped_indices` gives: it balances the negative lengths of text as they are."""
    assert order([sign * length for length in lengths], batch, chunks, seed) == (images_only if sign > 0 else text_only)


def test_every_row_comes_once_and_full_batches_have_one_modality():
    lengths = mixed()
    found = order(lengths)
    assert sorted(found) == list(range(81))
    full = [found[start : start + 12] for start in range(0, 72, 12)]
    assert all(len({lengths[i] > 0 for i in batch}) == 1 for batch in full)
    assert found[72:] == sorted(found[72:])


def test_one_modality_is_length_grouped():
    found = order(np.arange(1, 25), batch=4, chunks=2)
    assert sorted(found) == list(range(24))
    for start in range(0, 24, 8):
        first, second = (sum(found[i : i + 4]) for i in (start, start + 4))
        assert abs(first - second) <= 6


def test_ranks_share_an_epoch_and_wrap_around(tmp_path):
    path = make_set(tmp_path, 42)
    data = config(path, packing=False, sampler="modality_length")
    batches = [take(make_loader(data, rank=rank, world_size=2, accumulation_steps=2), 11) for rank in range(2)]
    seen = [name for rank in batches for batch in rank for name in batch.sample_ids]
    assert len(seen) == 44 and len(set(seen)) == 42
    for step in range(0, 8, 2):  # every full global batch: two ranks x two micro-batches
        modality = {bool(len(b.pixel_values_NCHW)) for rank in batches for b in rank[step : step + 2]}
        assert len(modality) == 1


def test_the_number_of_workers_may_change_on_resume(tmp_path):
    path = make_set(tmp_path, 42)
    loader = make_loader(config(path, packing=False, sampler="modality_length", num_workers=2))
    take(loader, 5)
    saved = json.loads(json.dumps(loader.state_dict()))
    expected = [batch.sample_ids for batch in take(loader, 30)]
    resumed = make_loader(config(path, packing=False, sampler="modality_length", num_workers=0))
    resumed.load_state_dict(saved)
    assert [batch.sample_ids for batch in take(resumed, 30)] == expected


def test_a_bad_row_shrinks_its_batch(tmp_path):
    write_images(tmp_path)
    rows = [row(i) for i in range(7)] + [row(7, "gone.png")]
    data = config(write_rows(tmp_path, rows), packing=False, sampler="modality_length", max_skip_share=0.2)
    loader = make_loader(data, micro_batch_size=4)
    batches = take(loader, 2)
    assert sorted(len(batch.sample_ids) for batch in batches) == [3, 4]
    assert loader.skipped == {"missing image": 1}


def test_packing_weights_and_shards_are_refused(tmp_path):
    path = make_set(tmp_path, 6)
    with pytest.raises(DataError, match=r"set data.packing=false"):
        make_loader(config(path, sampler="modality_length"))
    with pytest.raises(DataError, match=r"set all data.sources.weight to 1"):
        make_loader(config(path, weights=[2.0], packing=False, sampler="modality_length"))


def test_a_row_without_words_counts_as_text(tmp_path):
    write_images(tmp_path)
    path = write_rows(tmp_path, [row(0), {"id": "e", "conversations": conversation("", "x")}])
    take(make_loader(config(path, packing=False, sampler="modality_length")), 3)
