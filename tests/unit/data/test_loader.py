"""The loader's contract: rows, labels, order, shares of ranks and workers, resume, blending, bad rows."""

import gc
import itertools
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_moellava.config import ConfigError, DataError
from megatron_moellava.data.loader import started, summary
from megatron_moellava.data.tokenizer import load_tokenizer
from tests.helpers.data_files import (
    ASSETS,
    config,
    conversation,
    ids,
    make_loader,
    make_set,
    row,
    take,
    write_images,
    write_rows,
)


def same(left, right) -> bool:
    tensors = ("tokens_BS", "labels_BS", "position_ids_BS", "padding_mask_BS", "pixel_values_NCHW")
    return left.sample_ids == right.sample_ids and all(
        torch.equal(getattr(left, name), getattr(right, name)) for name in tensors
    )


def test_packed_rows_keep_their_contract(tmp_path):
    for batch in take(make_loader(config(make_set(tmp_path))), 8):
        assert batch.tokens_BS.shape == batch.labels_BS.shape == (1, 256)
        bounds = batch.cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds[-1] == 256 and bounds == sorted(set(bounds))
        assert batch.max_seqlen == max(end - start for start, end in itertools.pairwise(bounds))
        for start, end in itertools.pairwise(bounds):
            assert batch.position_ids_BS[0, start:end].tolist() == list(range(end - start))
            assert batch.labels_BS[0, end - 1] == -100  # never the first token of the next sample
        real = int(batch.padding_mask_BS.sum())
        assert batch.padding_mask_BS[0, :real].all() and real in bounds
        assert (batch.labels_BS[0, real:] == -100).all()
        assert (batch.tokens_BS == -200).sum() == 16 * len(batch.pixel_values_NCHW)


def test_labels_are_the_next_token_where_they_are_trained(tmp_path):
    tokenizer = load_tokenizer(ASSETS / "tok_bpe")
    path = write_rows(tmp_path, [row(i, None) for i in range(4)])
    batch = next(make_loader(config(path, packing_buffer=2)))
    trained = (batch.labels_BS[0] != -100).nonzero().flatten()
    assert torch.equal(batch.labels_BS[0, trained], batch.tokens_BS[0, trained + 1])
    first = batch.labels_BS[0, : batch.cu_seqlens[1]]
    assert tokenizer.decode(first[first != -100].tolist()).strip() == f"answer {batch.sample_ids[0][2:]}"


def test_padded_rows_keep_their_contract(tmp_path):
    for batch in take(make_loader(config(make_set(tmp_path), packing=False)), 8):
        rows, width = batch.tokens_BS.shape
        assert rows == 2 and width % 4 == 0 and batch.cu_seqlens is None
        assert batch.padding_mask_BS.sum(1).max() > width - 4
        assert torch.equal(batch.padding_mask_BS, batch.tokens_BS != 420)


@pytest.mark.parametrize("packing", [True, False])
def test_pixels_follow_the_order_of_image_tokens(tmp_path, packing):
    write_images(tmp_path)
    rows = [row(i, "ab"[i % 2] + ".png", id="ab"[i % 2]) for i in range(8)]
    path = write_rows(tmp_path, rows)
    batches = take(make_loader(config(path, packing=packing)), 6)
    pixels = {}
    for batch in batches:
        for name, image in zip(batch.sample_ids, batch.pixel_values_NCHW, strict=True):
            assert torch.equal(pixels.setdefault(name, image), image)
    assert not torch.equal(pixels["a"], pixels["b"])


def test_order_depends_on_the_seed_alone(tmp_path):
    path = make_set(tmp_path)
    first, again, other = (ids(take(make_loader(config(path), seed=seed), 6)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("mode", ["packed", "padded", "modality"])
def test_resume_continues_exactly(tmp_path, workers, mode):
    sampler = "modality_length" if mode == "modality" else "shuffle"
    data = config(make_set(tmp_path), packing=mode == "packed", num_workers=workers, sampler=sampler)
    loader = make_loader(data)
    take(loader, 7)
    saved = json.loads(json.dumps(loader.state_dict()))
    expected = take(loader, 30)  # over the end of the epoch
    resumed = make_loader(data)
    resumed.load_state_dict(saved)
    assert all(same(left, right) for left, right in zip(take(resumed, 30), expected, strict=True))


def test_resume_before_the_first_batch_and_twice(tmp_path):
    data = config(make_set(tmp_path), num_workers=1)
    loader = make_loader(data)
    start = loader.state_dict()
    expected = take(loader, 12)
    state = start
    for begin in (0, 4, 8):
        resumed = make_loader(data)
        resumed.load_state_dict(state)
        assert all(same(a, b) for a, b in zip(take(resumed, 4), expected[begin : begin + 4], strict=True))
        state = resumed.state_dict()


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seq_length": 128}, "seq_length: 256 then, 128 now"),
        ({"packing_buffer": 8}, "packing_buffer"),
        ({"template": "stablelm"}, "template"),
    ],
)
def test_a_changed_run_refuses_the_state(tmp_path, change, named):
    path = make_set(tmp_path)
    saved = make_loader(config(path)).state_dict()
    with pytest.raises(DataError, match=named):
        make_loader(config(path, **change)).load_state_dict(saved)
    with pytest.raises(DataError, match="seed: 1 then, 2 now"):
        make_loader(config(path), seed=2).load_state_dict(saved)


def test_changed_data_refuse_the_state(tmp_path):
    path = make_set(tmp_path)
    saved = make_loader(config(path)).state_dict()
    make_set(tmp_path, 41)
    with pytest.raises(
        DataError, match=r"set 1 of data.sources \(digest of its rows x weight\): \w+ x 1.0 then, \w+ x 1.0 now"
    ):
        make_loader(config(path)).load_state_dict(saved)
    sources = (*config(path).sources, *config(make_set(tmp_path / "more", 9)).sources)
    with pytest.raises(DataError, match=r"data.sources: 1 data sets then, 2 now"):
        make_loader(config(path, sources=sources)).load_state_dict(saved)


@pytest.mark.parametrize("broken", [{}, {"engine": {"class": "os.system", "fields": {}}}, {"engine": 3}])
def test_a_damaged_state_is_an_error_not_a_restart(tmp_path, broken):
    path = make_set(tmp_path)
    saved = make_loader(config(path)).state_dict()
    damaged = {key: value for key, value in saved.items() if key != "engine"} | broken
    with pytest.raises(DataError):
        make_loader(config(path)).load_state_dict(damaged)
    with pytest.raises(DataError, match="no loader state"):
        make_loader(config(path)).load_state_dict({})


def test_a_running_loader_is_not_restored(tmp_path):
    loader = make_loader(config(make_set(tmp_path)))
    next(loader)
    with pytest.raises(DataError, match="already runs"):
        loader.load_state_dict(loader.state_dict())


def test_weights_are_visits_per_epoch(tmp_path):
    paths = [write_rows(tmp_path, [row(i, None, id=name) for i in range(20)], f"{name}.json") for name in "ab"]
    loader = make_loader(config(*paths, weights=[2.0, 0.5], packing=False), micro_batch_size=1)
    assert loader.num_samples == 50
    seen = ids(take(loader, 50))
    assert (seen.count("a"), seen.count("b")) == (40, 10)


def test_a_sources_rows_are_read_from_its_own_image_folder(tmp_path):
    paths = []
    for seed, name in enumerate("xy"):
        write_images(tmp_path / name, ("a.png", "b.png")[seed:])  # x: both, y: b.png only
        paths.append(write_rows(tmp_path / name, [row(i, "ab"[seed] + ".png") for i in range(6)]))
    take(make_loader(config(*paths)), 4)


def test_a_bad_row_stops_the_run_by_default_and_is_named(tmp_path):
    path = write_rows(tmp_path, [row(0, None), row(1, "gone.png")])
    with pytest.raises(DataError, match=r"rows.json row 1, image 'gone.png': no such file"):
        take(make_loader(config(path)), 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_skipped_and_counted_up_to_the_share(tmp_path, workers):
    write_images(tmp_path)
    rows = [row(i) for i in range(20)]
    rows[3], rows[5] = row(3, "gone.png"), row(5, conversations=[])
    path = write_rows(tmp_path, rows)
    loader = make_loader(config(path, packing=False, num_workers=workers, max_skip_share=0.2), micro_batch_size=1)
    batches = take(loader, 36)
    assert not {"id3", "id5"} & set(ids(batches))
    assert set(ids(batches)) == {f"id{i}" for i in range(20)} - {"id3", "id5"}  # no good sample is lost
    assert set(loader.skipped) == {"missing image", "no conversation"}
    assert loader.seen == 36 + loader.skipped.total() and loader.trained == 36


def test_only_bad_rows_end_with_an_error_not_a_hang(tmp_path):
    path = write_rows(tmp_path, [row(i, "gone.png") for i in range(5)])
    with pytest.raises(DataError, match=r"of the 5 rows are bad, more than data.max_skip_share allows"):
        next(make_loader(config(path, max_skip_share=0.5)))


def test_counters_survive_a_resume(tmp_path):
    path = write_rows(tmp_path, [row(0, None), row(1, None), row(2, "gone.png")])
    data = config(path, max_skip_share=0.9)
    loader = make_loader(data)
    take(loader, 3)
    resumed = make_loader(data)
    resumed.load_state_dict(loader.state_dict())
    assert (resumed.seen, resumed.skipped) == (loader.seen, loader.skipped) and loader.skipped


def test_a_set_smaller_than_one_batch_repeats(tmp_path):
    path = write_rows(tmp_path, [row(0, None)])
    batch = next(make_loader(config(path, packing=False), micro_batch_size=4))
    assert batch.sample_ids == ["id0"] * 4


def test_an_empty_set_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no rows"):
        make_loader(config(write_rows(tmp_path, [])))
    with pytest.raises(DataError, match="is empty"):
        make_loader(config())


def test_a_template_of_another_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="</s>, which the tokenizer does not have"):
        make_loader(config(make_set(tmp_path), template="v1"))


def test_rows_longer_than_the_sequence_are_cut_and_counted(tmp_path):
    long = row(0, None, conversations=conversation("Is it raining?", "No, the sky is clear. " * 200))
    loader = make_loader(config(write_rows(tmp_path, [long, row(1, None)])))
    take(loader, 4)
    assert loader.notes["truncated"] > 0
    hopeless = row(0, None, conversations=conversation("Is it raining? " * 200, "No"))
    with pytest.raises(DataError, match=r"more than the 256 of a sample, and nothing to learn before the cut"):
        take(make_loader(config(write_rows(tmp_path, [hopeless], "b.json"))), 4)


def test_several_images_anywhere_in_the_conversation(tmp_path):
    write_images(tmp_path)
    turns = conversation("hello <image>", "hi", "and <image> or <image>?", "the first")
    path = write_rows(tmp_path, [{"id": "m", "image": ["a.png", "b.png", "a.png"], "conversations": turns}])
    batch = next(make_loader(config(path, packing=False), micro_batch_size=1))
    assert len(batch.pixel_values_NCHW) == 3 and (batch.tokens_BS == -200).sum() == 48
    assert torch.equal(batch.pixel_values_NCHW[0], batch.pixel_values_NCHW[2])


def test_fewer_rows_than_workers_and_ranks_are_shared(tmp_path):
    path = write_rows(tmp_path, [row(i, None) for i in range(3)])
    loaders = [make_loader(config(path, num_workers=2, packing=False), rank=rank, world_size=4) for rank in range(4)]
    found = Counter(name for loader in loaders for name in ids(take(loader, 3)))
    assert found == {"id0": 8, "id1": 8, "id2": 8}


def test_the_state_of_an_earlier_order_is_refused(tmp_path):
    loader = make_loader(config(make_set(tmp_path)))
    saved = loader.state_dict()
    with pytest.raises(DataError, match="order: None then, 2 now"):
        loader.load_state_dict(saved | {"fingerprint": saved["fingerprint"] | {"order": None}})


def test_data_elsewhere_continue_and_others_of_the_same_size_do_not(tmp_path):
    data = config(make_set(tmp_path / "a"))
    loader = make_loader(data)
    take(loader, 3)
    saved, expected = json.loads(json.dumps(loader.state_dict())), ids(take(loader, 5))
    moved = make_loader(config(make_set(tmp_path / "b")))
    moved.load_state_dict(saved)
    assert ids(take(moved, 5)) == expected
    path = tmp_path / "b" / "rows.json"
    path.write_text(path.read_text().replace("answer 3", "answer 4"))
    with pytest.raises(DataError, match="sources"):
        make_loader(config(path)).load_state_dict(saved)


def test_packing_passes_over_no_sample(tmp_path):
    loader = make_loader(config(make_set(tmp_path), seq_length=200))
    found = Counter(ids(take(loader, loader.rows_per_epoch())))
    assert found == {f"id{i}": 1 for i in range(40)}


def test_long_rows_are_named_cut_or_skipped(tmp_path, caplog):
    long = row(0, None, conversations=conversation("Is it raining?", "No, the sky is clear. " * 200))
    path = write_rows(tmp_path, [long, row(1, None)])
    loader = make_loader(config(path, packing_buffer=2), context_length=100)
    lengths = [batch.cu_seqlens.diff()[: len(batch.sample_ids)].tolist() for batch in take(loader, 3)]
    assert max(itertools.chain(*lengths)) == 100
    assert "rows.json row 0: cut at 100 of" in caplog.text and "raise data.max_sample_length" in caplog.text
    with pytest.raises(DataError, match=r"rows.json row 0: .* tokens with its images, more than the 100 of a sample"):
        take(make_loader(config(path, long_samples="skip"), context_length=100), 3)
    loader = make_loader(config(path, long_samples="skip", max_skip_share=0.6, max_sample_length=100))
    assert set(ids(take(loader, 3))) == {"id1"} and loader.skipped["too long"] > 0


def test_duplicate_ids_are_named_and_counted(tmp_path, caplog):
    path = write_rows(tmp_path, [row(i, None, id=f"id{i % 4}") for i in range(6)])
    loader = make_loader(config(path))
    assert "rows.json: row 4 repeats the id 'id0' of row 0, 4 rows in all" in caplog.text
    take(loader, 1)
    assert "4 rows share their id with another row" in summary([loader.counters()])


def test_what_is_odd_is_named_and_counted_in_the_summary(tmp_path, caplog):
    write_images(tmp_path)
    Image.new("RGBA", (9, 9)).save(tmp_path / "alpha.png")
    turns = [{"from": "gpt", "value": "hi"}, *conversation("a", "", "b", "c")]
    rows = [row(0, "alpha.png"), row(1, None, conversations=turns), row(2, "gone.png"), *(row(i) for i in range(3, 9))]
    loader = make_loader(config(write_rows(tmp_path, rows), packing=False, max_skip_share=0.5), micro_batch_size=1)
    take(loader, 8)
    text = summary([loader.counters(), loader.counters()])
    assert text.startswith("trained 16 samples, 2.00 epochs of 9; read 18, skipped 2: 2 missing image; noted 2 ")
    assert all(f"2 {what}" in text for what in ("leading answer dropped", "empty answer among others", "alpha dropped"))
    assert "rows.json row 0, image 'alpha.png': transparency is dropped" in caplog.text
    assert "rows.json row 1: it begins with an answer" in caplog.text


class Garbage:
    """A cycle that notes which process collects it."""

    def __init__(self, record: Path):
        self.record, self.cycle = record, self

    def __del__(self):
        with self.record.open("a") as file:
            file.write(f"{os.getpid()}\n")


class Forking:
    """Starts a worker that collects garbage, as any may at any time."""

    num_workers = 1

    def __iter__(self):
        worker = os.fork()
        if not worker:
            gc.collect()
            os._exit(0)
        os.waitpid(worker, 0)
        return iter(())


def test_workers_do_not_collect_the_garbage_of_the_process_that_started_them(tmp_path):
    """It may be an earlier stage's trainer, whose threads do not exist in a worker: a crash."""
    record = tmp_path / "collected"
    gc.disable()
    try:
        Garbage(record)
        started(Forking())
    finally:
        gc.enable()
    assert record.read_text() == f"{os.getpid()}\n"
    assert gc.get_freeze_count() == 0
