"""Every kind of source and image in one run, from real Energon data sets on disk: JSON and shards blended, many images,
videos, base64, tar members, tiles, for both towers."""

import base64
import json

import pytest
import torch
from PIL import Image

from megatron_moellava.data.loader import build_train_loader
from megatron_moellava.data.shards import make_shards
from megatron_moellava.data.tiling import num_tiles
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.towers import get_tower
from tests.helpers.data_files import ASSETS, config, conversation, ids, make_set, row, take, write_images, write_rows

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
