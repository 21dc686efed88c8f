"""An epoch is an epoch: each sample once (or its weight), for any ranks, workers and kind of rows; and 18's tolerances."""

import itertools
import json
from collections import Counter
from dataclasses import replace

import pytest

from megatron_moellava.config import DataError
from megatron_moellava.data.loader import summary
from megatron_moellava.data.order import Share, sample_order
from megatron_moellava.data.packing import pack_epoch
from megatron_moellava.data.shards import make_shards
from megatron_moellava.data.state import redistribute
from tests.helpers.data_files import config, ids, make_loader, make_set, row, take, write_images, write_rows

COUNT = 41
KINDS = {
    "packed": {},
    "packed, small buffer": {"packing_buffer": 1},
    "padded": {"packing": False},
    "tiled": {"image_grid": True, "seq_length": 512},
    "tiled, padded": {"image_grid": True, "packing": False, "seq_length": 512},
    "grouped by length": {"packing": False, "sampler": "modality_length"},
}


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("set"), COUNT)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, data_set):
    out = tmp_path_factory.mktemp("shards")
    make_shards(data_set, data_set.parent, out, rows_per_shard=9)
    return out


def steps(data, world_size: int, micro_batch_size: int, batch: int, count: int | None = None) -> list[list[str]]:
    """Sample ids of each step of an epoch, all ranks together."""
    per_rank = batch // (micro_batch_size * world_size)
    loaders = [
        make_loader(
            data,
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            accumulation_steps=per_rank,
        )
        for rank in range(world_size)
    ]
    count = count or -(-loaders[0].rows_per_epoch() // batch)
    found = [[name for loader in loaders for name in ids(take(loader, per_rank))] for _ in range(count)]
    for loader in loaders:
        loader.close()
    return found


@pytest.mark.parametrize("world_size, workers", [(1, 0), (2, 0), (4, 0), (1, 3), (2, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_is_in_an_epochs_steps(data_set, kind, world_size, workers):
    """Again only to fill the last step (grouped by length, an epoch's own last round begins that, as the original's)."""
    data = config(data_set, num_workers=workers, **KINDS[kind])
    padded = not data.packing
    found = steps(data, world_size, 1 + padded, 8)
    counted = Counter(itertools.chain(*found))
    assert len(counted) == COUNT and max(counted.values()) <= (3 if data.sampler == "modality_length" else 2)
    before_last = Counter(itertools.chain(*found[:-1]))
    assert max(before_last.values()) == 1
    if padded:
        assert counted.total() == 48


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "grouped by length"])
@pytest.mark.parametrize("source", ["json", "shards"])
def test_the_samples_of_a_step_do_not_depend_on_ranks_and_workers(data_set, shards, kind, source):
    data = config({"json": data_set, "shards": shards}[source], **KINDS[kind])
    expected = [sorted(step) for step in steps(data, 1, 1, 4, 14)]
    for world_size, workers, micro_batch_size in ((2, 0, 1), (4, 1, 1), (1, 2, 1 if data.packing else 4)):
        changed = replace(data, num_workers=workers)
        assert [sorted(step) for step in steps(changed, world_size, micro_batch_size, 4, 14)] == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 5, 13])
def test_another_number_of_ranks_and_workers_continues_at_any_step(data_set, kind, step):
    data = config(data_set, **KINDS[kind])
    grouped = data.sampler == "modality_length"

    def loaders(world_size: int, workers: int = 0):
        share = {"world_size": world_size, "micro_batch_size": 1, "accumulation_steps": 4 // world_size}
        return [make_loader(replace(data, num_workers=workers), rank=rank, **share) for rank in range(world_size)]

    running = loaders(2)
    taken = [ids(take(loader, 2 * step)) for loader in running]
    saved = {rank: json.loads(json.dumps(loader.state_dict())) for rank, loader in enumerate(running)}
    expected = [sorted(ids([batch for loader in running for batch in take(loader, 2)])) for _ in range(3)]
    for world_size, workers in ((1, 0), (4, 0)) if not grouped or step < 10 else ((1, 0),):
        resumed = loaders(world_size, workers)
        for loader in resumed:
            loader.load_states(saved)
        per_rank = 4 // world_size
        found = [sorted(ids([batch for loader in resumed for batch in take(loader, per_rank)])) for _ in range(3)]
        assert found == expected
        assert sum(loader.trained for loader in resumed) >= sum(map(len, taken))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 1.0), (0.5, 3.0), (0.25, 0.1), (2.5, 1.0)])
def test_weights_are_visits(weights):
    shares = [Share(40, weights[0]), Share(7, weights[1], 3)]
    seen = Counter(itertools.chain(*(sample_order(shares, 1, epoch) for epoch in range(20))))
    for (start, share), weight in zip(((0, shares[0]), (40, shares[1])), weights, strict=True):
        visits = [seen[start + i] for i in range(share.rows)]
        assert max(visits) - min(visits) <= 1 and sum(visits) == int(share.rows * weight * 20)


def test_a_row_comes_again_only_when_all_others_have_come():
    order = sample_order([Share(50, 2.0)], 3, 0)
    assert sorted(order[:50]) == sorted(order[50:]) == list(range(50)) and order[:50] != order[50:]


def test_sources_are_mixed_evenly():
    order = sample_order([Share(100), Share(900)], 3, 0)
    for start in range(0, 1000, 100):
        assert 8 <= sum(number < 100 for number in order[start : start + 100]) <= 12


@pytest.mark.parametrize("second", [1.0, 0.5])
def test_a_source_listed_twice_is_one_with_the_summed_weight(tmp_path, caplog, second):
    """Also under another path; with another image folder it is another source."""
    path = make_set(tmp_path / "a", 12)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    twice = config(path, tmp_path / "link" / "rows.json", weights=[1.0, second], packing=False)
    once = config(path, weights=[1.0 + second], packing=False)
    assert ids(take(make_loader(twice), 12)) == ids(take(make_loader(once), 12))
    assert f"is listed twice: one source, whose rows are seen {1 + second:g} times per epoch" in caplog.text
    write_images(tmp_path / "b")
    other = replace(twice.sources[1], image_folder=str(tmp_path / "b"))
    assert make_loader(replace(twice, sources=(twice.sources[0], other))).num_samples == int(12 + 12 * second)


def test_the_last_line_says_what_was_trained(data_set):
    loader = make_loader(config(data_set, packing=False))
    take(loader, 31)
    loader.untrained(2)
    assert summary([loader.counters()]).startswith("trained 60 samples, 1.51 epochs of 41; read 62, skipped 0")


@pytest.mark.parametrize("seed", range(5))
def test_packing_an_epoch_loses_nothing(seed):
    import random

    draw = random.Random(seed)
    lengths = [draw.choice([0, *range(1, 101)]) for _ in range(draw.randint(1, 300))]
    samples = [1000 + index for index in range(len(lengths))]
    for buffer in (1, 7, 64, 1000):
        rows = pack_epoch(samples, lengths, 100, buffer)
        assert sorted(itertools.chain(*rows)) == samples
        assert all(len(row) > 0 and sum(lengths[number - 1000] for number in row) <= 100 for row in rows)


def test_only_unusable_samples_are_still_met():
    assert pack_epoch([5, 6], [0, 0], 10, 4) == [[5, 6]] and pack_epoch([], [], 10, 4) == []


# --- tolerances -------------------------------------------------------------------------------------------------------

PLACES = {"first": range(4), "last": range(76, 80), "every 20th": range(0, 80, 20)}


@pytest.mark.parametrize("world_size, workers", [(1, 0), (1, 2), (4, 0), (2, 1)])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_a_share_of_bad_rows_below_the_tolerance_never_stops_a_run(tmp_path, place, packing, world_size, workers):
    """4 of 80 rows: half of them without their picture, half without an answer. Five epochs."""
    write_images(tmp_path)
    rows = [row(i, "a.png") for i in range(80)]
    for index, number in enumerate(PLACES[place]):
        rows[number] = row(number, "gone.png") if index % 2 else row(number, "a.png", conversations=[])
    path = write_rows(tmp_path, rows)
    data = config(path, packing=packing, num_workers=workers, max_skip_share=0.05, seq_length=512)
    loaders = [make_loader(data, rank=rank, world_size=world_size, micro_batch_size=1) for rank in range(world_size)]
    count = 5 * loaders[0].rows_per_epoch() // world_size
    found = Counter()
    for loader in loaders:
        found.update(ids(take(loader, count)))
        loader.check_skipped(sum(other.num_bad for other in loaders))
        loader.close()
    assert found.keys() == {f"id{i}" for i in range(80)} - {f"id{i}" for i in PLACES[place]}
    with pytest.raises(DataError, match=r"4 of the 80 rows are bad, more than data.max_skip_share allows; the last: "):
        loader = make_loader(replace(data, max_skip_share=0.049))
        take(loader, 2 * loader.rows_per_epoch())


def test_the_ranks_bad_rows_together_are_too_many(tmp_path):
    rows = [row(i, None) if i % 4 else row(i, "gone.png") for i in range(40)]
    data = config(write_rows(tmp_path, rows), packing=False, max_skip_share=0.1)
    loaders = [make_loader(data, rank=rank, world_size=4, micro_batch_size=1) for rank in range(4)]
    for loader in loaders:
        take(loader, 5)
    bad = sum(loader.num_bad for loader in loaders)
    assert bad > 4 >= max(loader.num_bad for loader in loaders)
    with pytest.raises(DataError, match=f"{bad} of the 40 rows are bad"):
        loaders[0].check_skipped(bad)


def test_ranks_that_drifted_apart_continue_from_what_all_have_read():
    counters = {"seen": 3, "trained": 2, "skipped": {"x": 1}, "notes": {}, "bad_epoch": 0, "bad": [5]}
    saved = [
        {"fingerprint": {}, "engine": {"epoch": 0, "position": position}, "counters": counters | {"bad": [position]}}
        for position in (8, 10)
    ]
    first, second, third = redistribute(saved, 3)
    assert first["engine"] == second["engine"] == third["engine"] == {"epoch": 0, "position": 8}
    assert first["counters"]["trained"] == 4 and first["counters"]["bad"] == [8, 10] and second["counters"]["seen"] == 0
