"""Tokens of every sample, measured once."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_moellava.config import DataError, Source
from megatron_moellava.data.batch import from_wire
from megatron_moellava.data.lengths import measured_lengths, tokens_of
from megatron_moellava.data.pipeline import Pipeline
from megatron_moellava.data.sources import Reader, open_sources
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.towers import get_tower
from tests.helpers.data_files import (
    TOWER,
    config,
    conversation,
    encoder,
    make_loader,
    make_videos,
    row,
    write_images,
    write_rows,
)
from tests.helpers.modalities import DEPTH, write_pictures
from tests.helpers.paths import ASSETS


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ASSETS / "tok_bpe")


def pipeline(tmp_path, tokenizer, rows, **limits) -> Pipeline:
    path = write_rows(tmp_path, rows)
    reader = Reader(open_sources([Source(path=str(path))], tmp_path / "cache")[0])
    return Pipeline(reader, encoder(tokenizer, **limits), TOWER, config(path), pad_multiple=4)


def test_lengths_are_those_of_the_tokens_and_0_for_what_cannot_be_used(tmp_path, tokenizer):
    write_images(tmp_path)
    made = pipeline(tmp_path, tokenizer, [row(0), {"id": "bad"}, row(2, None)])
    lengths = measured_lengths(made, ["key"], tmp_path)
    assert lengths.tolist() == [len(made.encode(0)[0]), 0, len(made.encode(2)[0])]


def test_they_are_measured_once_and_again_when_something_has_changed(tmp_path, tokenizer):
    write_images(tmp_path)
    made = pipeline(tmp_path, tokenizer, [row(number) for number in range(6)])
    lengths = measured_lengths(made, ["key"], tmp_path)
    (file,) = tmp_path.glob("lengths-*.npy")
    before = file.stat().st_mtime_ns
    assert (measured_lengths(made, ["key"], tmp_path) == lengths).all() and file.stat().st_mtime_ns == before
    np.save(file, lengths + 1)
    assert (measured_lengths(made, ["key"], tmp_path) == lengths).all(), "the probes have told"
    measured_lengths(made, ["another key"], tmp_path)
    assert len(list(tmp_path.glob("lengths-*.npy"))) == 2


def test_a_damaged_file_is_measured_anew(tmp_path, tokenizer):
    write_images(tmp_path)
    made = pipeline(tmp_path, tokenizer, [row(0)])
    lengths = measured_lengths(made, ["key"], tmp_path)
    (file,) = tmp_path.glob("lengths-*.npy")
    for content in (b"", b"no array"):
        file.write_bytes(content)
        assert (measured_lengths(made, ["key"], tmp_path) == lengths).all()


def test_a_folder_that_cannot_be_written_says_what_to_do(tmp_path, tokenizer):
    write_images(tmp_path)
    made = pipeline(tmp_path, tokenizer, [row(0)])
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"set checkpoint\.save to a folder that can be written"):
        measured_lengths(made, ["key"], tmp_path / "file")


def test_pictures_at_native_resolution_are_measured_with_their_work(tmp_path, tokenizer):
    write_images(tmp_path)
    path = write_rows(tmp_path, [row(0), {"id": "bad"}, row(2, None)])
    reader = Reader(open_sources([Source(path=str(path))], tmp_path / "cache")[0])
    tower = get_tower("naflex-tiny")
    made = Pipeline(reader, encoder(tokenizer), tower, config(path), pad_multiple=4)
    measured = measured_lengths(made, ["key"], tmp_path)
    encoded, *_ = made.encode(0)
    ((rows, columns),) = encoded.grids
    assert measured.tolist() == [[len(encoded), tower.work(rows * columns)], [0, 0], [len(made.encode(2)[0]), 0]]
    assert tokens_of(measured).tolist() == measured[:, 0].tolist()
    assert (measured_lengths(made, ["key"], tmp_path) == measured).all()


def test_pooled_frames_are_measured_with_the_work_of_the_tower(tmp_path, tokenizer):
    """A quarter of the tokens, but all of the frames."""
    for number in range(5):
        write_images(tmp_path / "frames", [f"{number}.png"])
    write_images(tmp_path)
    film = row(0, None, conversations=conversation("<video>\nwhat?", "a lake")) | {"video": "frames"}
    path = write_rows(tmp_path, [film, row(1), row(2, None)])
    data = config(path, video_frames=5, video_pooling="2x2x2")
    reader = Reader(open_sources(data.sources, tmp_path / "cache")[0])
    made = Pipeline(reader, encoder(tokenizer), TOWER, data, pad_multiple=4)
    measured = measured_lengths(made, ["key"], tmp_path)
    assert measured[:, 1].tolist() == [5 * TOWER.work(17), TOWER.work(17), 0]
    assert tokens_of(measured).tolist() == [len(made.encode(number)[0]) for number in range(3)]


def test_rows_that_were_sorted_without_the_work_of_the_tower_are_another_order(tmp_path):
    """Of pooled frames: a position in the one order is none in the other, and checkpoints of then do not say which it was."""
    loader = make_loader(config(make_videos(tmp_path, 6), video_pooling="2x2x2", seq_length=512))
    next(loader)
    saved = loader.state_dict()
    del saved["fingerprint"]["cost"]
    again = make_loader(config(tmp_path / "rows.json", video_pooling="2x2x2", seq_length=512))
    with pytest.raises(DataError, match="cost: None then, 'attention and tower' now"):
        again.load_state_dict(saved)


def test_a_tower_of_a_modalitys_own_counts_as_much_as_it_does(tmp_path, tokenizer):
    """A copy of the tower as a picture of the tower; one of other sizes by its layers, its width and its patches."""
    write_images(tmp_path)
    write_pictures(tmp_path)
    asked = conversation("<image> <depth>?", "yes")
    path = write_rows(tmp_path, [{"id": "a", "image": "a.png", "depth": "depth/0.png", "conversations": asked}])
    reader = Reader(open_sources([Source(path=str(path))], tmp_path / "cache")[0])
    found = {}
    for name in (str(ASSETS / "openai/clip-tiny"), "siglip-tiny"):
        data = config(path, modalities=(replace(DEPTH, tower=name, projector="own"),))
        made = Pipeline(reader, encoder(tokenizer), TOWER, data, pad_multiple=4)
        ((tokens, found[name]),) = measured_lengths(made, [name], tmp_path)
        assert tokens == len(made.encode(0)[0])
    one, own = TOWER.work(TOWER.num_rows), get_tower("siglip-tiny")
    times = own.hidden_size * own.num_used_layers / (TOWER.hidden_size * TOWER.num_used_layers)
    assert [*found.values()] == [2 * one, int(one + own.work(own.num_rows) * times)]


@pytest.mark.parametrize("main", ["naflex-tiny", "siglip-tiny@newline"])
def test_a_modalitys_own_tower_beside_one_with_grids(tmp_path, tokenizer, main):
    """A depth map between two pictures: its tokens are its tower's, batches bring the grids of the others, work is of all."""
    write_images(tmp_path)
    write_pictures(tmp_path)
    turns = conversation("<image>\n<depth>\n<image>\nwhich?", "the left one")
    path = write_rows(tmp_path, [row(0, ["a.png", "b.png"], conversations=turns) | {"depth": "depth/0.png"}])
    data = config(path, modalities=(replace(DEPTH, tower="clip-tiny", projector="own"),), seq_length=512)
    reader, tower, own = (
        Reader(open_sources(data.sources, tmp_path / "cache")[0]),
        get_tower(main),
        get_tower("clip-tiny"),
    )
    made = Pipeline(reader, encoder(tokenizer), tower, data, pad_multiple=4)
    encoded, *_ = made.encode(0)
    first, none, last = encoded.grids
    assert none == () and encoded.features[1] == own.num_features and first and last
    batch = from_wire(made[[0]]["batch"])
    assert batch.grids == (first, last) and batch.apart["depth"].shape == (1, *own.pixel_shape)
    assert len(batch.shows_R) == batch.counts.image_rows == sum(encoded.features)
    begins = batch.shows_R[encoded.features[0] : encoded.features[0] + own.num_features]
    assert begins[0] == encoded.features[0] + encoded.features[2], (
        "its visual tokens are behind those of the model's tower"
    )
    times = own.hidden_size * own.num_used_layers / (tower.hidden_size * tower.num_used_layers)
    patches = [rows * columns for rows, columns, *_ in (first, last)] if tower.native else [tower.num_rows] * 2
    work = sum(map(tower.work, patches)) + own.work(own.num_rows) * times
    assert measured_lengths(made, ["key"], tmp_path).tolist() == [[len(encoded), int(work)]]
