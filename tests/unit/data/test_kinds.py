"""Every kind of source and image in one run, from real Energon data sets on disk: JSON and shards blended, many images,
videos, base64, tar members, tiles, for both towers."""

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_moellava.config import DataError
from megatron_moellava.data.first_rows import first_rows_problem
from megatron_moellava.data.images import preprocess
from megatron_moellava.data.loader import build_train_loader
from megatron_moellava.data.quantities import shown
from megatron_moellava.data.shards import make_shards
from megatron_moellava.data.tiling import num_tiles
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.towers import get_tower
from tests.helpers.data_files import ASSETS, config, conversation, ids, make_set, row, take, write_images, write_rows
from tests.helpers.modalities import DEPTH, THERMAL, write_pictures

TOWERS = {"clip": "openai/clip-tiny", "siglip": "google/siglip-tiny"}


def make_loader(data, family: str = "clip"):
    share = {"seed": 1, "rank": 0, "world_size": 1, "micro_batch_size": 1}
    tower = get_tower(str(ASSETS / TOWERS[family]))
    return build_train_loader(data, load_tokenizer(ASSETS / "tok_bpe"), tower, pad_multiple=1, **share), tower


def kinds(folder) -> dict[str, tuple[dict, int]]:
    """id -> (row, images)"""
    write_images(folder)
    frames = [Image.new("RGB", (40, 30), (20 * i, 0, 0)) for i in range(9)]
    frames[0].save(folder / "v.gif", save_all=True, append_images=frames[1:])
    (folder / "frames").mkdir()
    for number, frame in enumerate(frames):
        frame.save(folder / "frames" / f"{number:02}.png")
    text = base64.b64encode((folder / "b.png").read_bytes()).decode()
    many = ["a.png", "b.png"] * 10
    late = conversation("hello", "hi", "and this? <image>", "a lake")
    return {
        "one": (row(1), 1),
        "text": (row(2, None), 0),
        "base64": (row(3, f"data:image/png;base64,{text}"), 1),
        "twenty": (row(4, many, conversations=conversation("<image>" * 20 + "\nWhich?", "the first")), 20),
        "late": (row(5, "a.png", conversations=late), 1),
        "gif": ({"video": "v.gif", "conversations": conversation("<video>\nWhat?", "red")}, 8),
        "folder": ({"video": "frames", "conversations": conversation("See <video>", "red")}, 8),
    }


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("grid", [False, True], ids=["whole", "tiles"])
def test_every_kind_from_json_and_from_shards(tmp_path, family, grid):
    rows = kinds(tmp_path / "raw")
    path = write_rows(tmp_path / "raw", [record | {"id": name} for name, (record, _) in rows.items()])
    make_shards(path, tmp_path / "raw", tmp_path / "shards", rows_per_shard=3, max_images=20)
    found = {}
    for source in (path, tmp_path / "shards"):
        data = config(source, packing=False, seq_length=4096, max_images=20, image_grid=grid)
        loader, tower = make_loader(data, family)
        for batch in take(loader, len(rows)):
            (name,), pixels = batch.sample_ids, batch.pixel_values_NCHW
            images = rows[name][1]
            assert (batch.tokens_BS == -200).sum() == tower.num_features * len(pixels)
            video = "video" in rows[name][0]
            tiled = grid and not video  # a frame is shown whole, in a shard too
            expected = images * (num_tiles(40, 30, tower.image_size) if tiled else 1)
            assert len(pixels) == expected, (name, source)
            if not (grid and video):
                before = found.setdefault(name, (batch.tokens_BS, pixels))
                assert torch.equal(before[0], batch.tokens_BS) and torch.equal(before[1], pixels)
        assert loader.seen >= len(rows) and not loader.skipped
    assert len(found) >= len(rows) - 2


def test_json_and_shards_are_blended_by_weight_and_continued(tmp_path):
    left, right = make_set(tmp_path / "left", 24), make_set(tmp_path / "right", 24)
    renamed = [record | {"id": f"shard{i}"} for i, record in enumerate(json.loads(right.read_text()))]
    make_shards(write_rows(tmp_path / "right", renamed), tmp_path / "right", tmp_path / "shards", rows_per_shard=7)
    data = config(left, tmp_path / "shards", weights=[2.0, 1.0], packing=False, num_workers=1)
    loader, _ = make_loader(data)
    seen = ids(take(loader, 72))
    assert loader.num_samples == 72
    assert (sum(name.startswith("shard") for name in seen), len(set(seen))) == (24, 48)
    saved, expected = json.loads(json.dumps(loader.state_dict())), ids(take(loader, 20))
    loader.close()
    resumed, _ = make_loader(data)
    resumed.load_state_dict(saved)
    assert ids(take(resumed, 20)) == expected
    resumed.close()


def mixed(folder) -> list[dict]:
    """Rows with pictures of every modality, several in a row, and none."""
    write_images(folder)
    write_pictures(folder)
    compare = conversation("<depth> <image>\n<thermal>?", "warm and near", "and <depth>?", "far")
    return [
        row(0),
        row(1, None),
        {"id": "id2", "depth": "depth/0.png", "conversations": conversation("<depth>\nHow far?", "3 m")},
        {"id": "id3", "thermal": "thermal/1.tif", "conversations": conversation("How warm is it in <thermal>?", "20 C")},
        {"id": "id4", "image": "b.png", "depth": ["depth/1.png", "depth/0.png"], "thermal": "thermal/0.tif",
         "conversations": compare},
        row(5, "b.png"),
    ]  # fmt: skip


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_modalities_from_json_and_from_shards_with_known_pixels(tmp_path, packing):
    path = write_rows(tmp_path / "raw", mixed(tmp_path / "raw"))
    make_shards(path, tmp_path / "raw", tmp_path / "shards", rows_per_shard=4, modalities=(DEPTH, THERMAL))
    found = {}
    for source in (path, tmp_path / "shards"):
        data = config(source, packing=packing, modalities=(DEPTH, THERMAL), num_workers=int(not packing))
        loader, tower = make_loader(data)
        for batch in take(loader, 6):
            for name in batch.sample_ids if not packing else ():
                before = found.setdefault(name, (batch.pictures, batch.pixel_values_NCHW))
                assert before[0] == batch.pictures and torch.equal(before[1], batch.pixel_values_NCHW)
            kinds = [kind for kind, _ in batch.pictures]
            assert not kinds or sum(count for _, count in batch.pictures) == batch.counts.image_rows
        assert not loader.skipped and loader.notes.keys() <= {""}
        loader.close()
    if packing:
        return
    side = tower.num_features
    assert [kind for kind, _ in found["id4"][0]] == ["depth", "image", "thermal", "depth"]
    assert found["id2"][0] == (("depth", side),) and found["id0"][0] == found["id1"][0] == ()
    levels = np.asarray(Image.open(tmp_path / "raw/depth/0.png"))
    expected = torch.from_numpy(preprocess(Image.fromarray(shown(levels, DEPTH)), tower, "pad"))
    assert torch.equal(found["id4"][1][3], expected) and torch.equal(found["id2"][1][0], expected)


def continued(data, before: int, after: int) -> tuple[dict, list]:
    """(state after `before` batches; the next `after`, each beside that of a loader that goes on from the state)"""
    loader, _ = make_loader(data)
    take(loader, before)
    saved, expected = json.loads(json.dumps(loader.state_dict())), take(loader, after)
    resumed, _ = make_loader(data)
    resumed.load_state_dict(saved)
    return saved, list(zip(expected, take(resumed, after), strict=True))


def test_a_run_with_modalities_continues_exactly_and_not_with_others(tmp_path):
    path = write_rows(tmp_path, [record | {"id": f"{n}{record['id']}"} for n in range(5) for record in mixed(tmp_path)])
    data = config(path, modalities=(DEPTH, THERMAL))
    saved, batches = continued(data, 3, 6)
    for batch, again in batches:
        assert again.sample_ids == batch.sample_ids and again.pictures == batch.pictures
        assert torch.equal(again.pixel_values_NCHW, batch.pixel_values_NCHW)
    other, _ = make_loader(replace(data, modalities=(THERMAL, DEPTH)))
    with pytest.raises(DataError, match=r"modalities: .*depth.* then"):
        other.load_state_dict(saved)


def test_a_file_that_the_record_does_not_declare_stops_the_run_before_and_in_it(tmp_path):
    write_images(tmp_path)
    turns = conversation("<depth>\nHow far?", "3 m")
    path = write_rows(tmp_path, [{"id": "x", "depth": "a.png", "conversations": turns}])
    data = config(path, modalities=(DEPTH,))
    message = r"rows.json row 0, depth 'a.png': holds pixels of the mode RGB, and 'depth' of data.modalities declares"
    assert re.match(message, first_rows_problem(data.sources[0], data))
    loader, _ = make_loader(data)
    with pytest.raises(DataError, match=message):
        next(loader)
    with pytest.raises(DataError, match=message):
        make_shards(path, tmp_path, tmp_path / "shards", modalities=(DEPTH,))


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_modality_with_a_tower_of_its_own_has_its_pixels_and_its_tokens_there(tmp_path, packing):
    """Of another resolution. `shows_R` says where each visual token belongs: those of the model's tower come first."""
    path = write_rows(tmp_path, mixed(tmp_path))
    own = get_tower("siglip-tiny")
    records = (replace(DEPTH, tower="siglip-tiny", projector="own"), THERMAL)
    loader, tower = make_loader(config(path, packing=packing, modalities=records, seq_length=512))
    levels = np.asarray(Image.open(tmp_path / "depth/1.png"))
    far = torch.from_numpy(preprocess(Image.fromarray(shown(levels, DEPTH)), own, "pad"))
    seen = set()
    for batch in take(loader, 6):
        seen |= {*batch.sample_ids}
        tokens = [count for _, count in batch.pictures]
        depth = [count for kind, count in batch.pictures if kind == "depth"]
        assert set(depth) <= {own.num_features} and len(batch.apart["depth"]) == len(depth)
        assert batch.counts.apart_inputs == (len(depth),) and batch.counts.image_rows == (batch.tokens_BS == -200).sum()
        if not depth:
            assert batch.shows_R is None
            continue
        shared = len(batch.pixel_values_NCHW) * tower.num_features
        numbers = torch.split(batch.shows_R, tokens)
        kinds = [kind for kind, _ in batch.pictures]
        starts = {True: iter(range(0, shared, tower.num_features)), False: iter(range(shared, 10**6, own.num_features))}
        for kind, part in zip(kinds, numbers, strict=True):
            start = next(starts[kind != "depth"])
            assert part.tolist() == list(range(start, start + len(part)))
        if batch.sample_ids == ["id4"]:
            assert kinds == ["depth", "image", "thermal", "depth"] and torch.equal(batch.apart["depth"][0], far)
    assert len(seen) == 6
    loader.close()


def test_an_own_towers_tokens_are_part_of_the_order_and_of_the_lengths(tmp_path):
    path = write_rows(tmp_path, [record | {"id": f"{n}{record['id']}"} for n in range(5) for record in mixed(tmp_path)])
    data = config(path, modalities=(replace(DEPTH, tower="siglip-tiny", projector="own"), THERMAL), seq_length=512)
    saved, batches = continued(data, 2, 4)
    for batch, again in batches:
        assert again.sample_ids == batch.sample_ids and torch.equal(again.apart["depth"], batch.apart["depth"])
    other, _ = make_loader(replace(data, modalities=(DEPTH, THERMAL)))
    with pytest.raises(DataError, match="towers: "):
        other.load_state_dict(saved)


def test_pairs_encode_a_picture_of_an_own_tower_once(tmp_path):
    write_images(tmp_path)
    write_pictures(tmp_path)
    rows = [
        {
            "id": f"p{n}",
            "prompt": "<depth> or <image>?",
            "image": "a.png",
            "depth": f"depth/{n % 2}.png",
            "chosen": "yes",
            "rejected": "no",
        }
        for n in range(4)
    ]
    path = write_rows(tmp_path, rows)
    record = replace(DEPTH, tower="siglip-tiny", projector="own")
    data = config(path, modalities=(record,), seq_length=512)
    share = {"seed": 1, "rank": 0, "world_size": 1, "micro_batch_size": 1}
    tower = get_tower(str(ASSETS / TOWERS["clip"]))
    loader = build_train_loader(data, load_tokenizer(ASSETS / "tok_bpe"), tower, pad_multiple=1, pairs=True, **share)
    batch = next(loader)
    pairs, own = len(batch.pairs), get_tower("siglip-tiny").num_features
    assert len(batch.pixel_values_NCHW) == len(batch.apart["depth"]) == pairs > 1
    parts = batch.shows_R.split([own, tower.num_features] * 2 * pairs)
    for pair in range(pairs):
        first, second = pairs * tower.num_features + pair * own, pair * tower.num_features
        assert [part[0].item() for part in parts[4 * pair : 4 * pair + 4]] == [first, second] * 2
    loader.close()
