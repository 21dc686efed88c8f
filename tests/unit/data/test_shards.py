"""Shards: hold what the JSON holds, continue after an interruption, survive damage, and never touch other files."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_moellava.config import DataError
from megatron_moellava.data.sample import BadSample, parse_record
from megatron_moellava.data.shards import make_shards
from megatron_moellava.data.sources import Reader
from tests.helpers.data_files import (
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
from tests.helpers.paths import ASSETS, REPO


def contents(loader, batches: int) -> dict:
    found = {}
    for batch in take(loader, batches):
        for index, name in enumerate(batch.sample_ids):
            real = batch.padding_mask_BS[index]
            found[name] = (batch.tokens_BS[index][real].tolist(), batch.labels_BS[index][real].tolist())
    return found


def test_shards_hold_the_same_samples_as_the_json(tmp_path):
    path = make_set(tmp_path / "raw")
    report = make_shards(path, tmp_path / "raw", tmp_path / "shards", rows_per_shard=9, workers=2)
    assert report["written"] == report["rows"] == 40 and report["shards"] == 5 and report["images"] == 26
    plain = contents(make_loader(config(path, packing=False)), 40)
    shards = contents(make_loader(config(tmp_path / "shards", packing=False)), 40)
    assert plain == shards and len(shards) == 40


def test_resume_continues_exactly_from_shards(tmp_path):
    path = make_set(tmp_path / "raw")
    make_shards(path, tmp_path / "raw", tmp_path / "shards", rows_per_shard=9)
    data = config(tmp_path / "shards", num_workers=1)
    loader = make_loader(data)
    take(loader, 5)
    saved = json.loads(json.dumps(loader.state_dict()))
    expected = ids(take(loader, 12))
    resumed = make_loader(data)
    resumed.load_state_dict(saved)
    assert ids(take(resumed, 12)) == expected


def test_an_interrupted_conversion_writes_only_what_is_missing(tmp_path):
    path, out = make_set(tmp_path / "raw"), tmp_path / "shards"
    make_shards(path, tmp_path / "raw", out, rows_per_shard=9)
    first = {file.name: file.read_bytes() for file in out.glob("*.tar")}
    (out / "shard-000002.tar").unlink()
    (out / "reports" / "shard-000002.json").unlink()
    (out / "shard-000002.partial").write_bytes(b"half")
    times = {file.name: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    make_shards(path, tmp_path / "raw", out, rows_per_shard=9)
    assert {file.name: file.read_bytes() for file in out.glob("*.tar")} == first
    assert all((out / name).stat().st_mtime_ns == time for name, time in times.items())


def second_run(path, out, **options) -> tuple[str, dict | None]:
    """(error or "", report without what names this run)"""
    try:
        return "", make_shards(path, path.parent, out, rows_per_shard=4, **options)
    except DataError as error:
        return str(error), None


BAD_ROWS = {
    "missing image": {"image": "gone.png"},
    "unreadable image": {"image": "broken.png"},
    "no conversation": {"conversations": []},
    "unknown key": {"img": "a.png"},
}


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_refused_conversion_is_refused_again(tmp_path, kind, workers):
    path = write_rows(write_images(tmp_path), [row(i, **(BAD_ROWS[kind] if i == 5 else {})) for i in range(20)])
    (tmp_path / "broken.png").write_bytes(b"x")
    for _ in range(3):
        message, _ = second_run(path, tmp_path / "out", workers=workers)
        assert "1 of 20 rows are bad, more than --max-skip-share 0.0 allows" in message
    first, again = (second_run(path, tmp_path / "out", max_skip_share=0.05)[1] for _ in range(2))
    assert first == again and first["written"] == 19 and first["skipped"] == {kind: 1}
    assert "1 of 20 rows are bad" in second_run(path, tmp_path / "out")[0]


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_a_repaired_picture_is_in_the_shards_of_the_next_run(tmp_path, share):
    path = write_rows(write_images(tmp_path), [row(i, "late.png" if i == 5 else "a.png") for i in range(20)])
    message, report = second_run(path, tmp_path / "out", max_skip_share=share)
    assert ("rows are bad" in message) if not share else (report["written"] == 19)
    write_images(tmp_path, ("late.png",))
    message, report = second_run(path, tmp_path / "out", max_skip_share=share)
    assert message == "" and report["written"] == 20 and not report["skipped"]


def test_a_changed_picture_is_in_the_shards_of_the_next_run(tmp_path):
    path, out = make_set(tmp_path / "raw", 12), tmp_path / "out"
    second_run(path, out)
    before = {file.name: file.read_bytes() for file in out.glob("*.tar")}
    Image.new("RGB", (50, 50), "red").save(tmp_path / "raw" / "b.png")
    second_run(path, out)
    changed = [file.name for file in out.glob("*.tar") if file.read_bytes() != before[file.name]]
    shutil.rmtree(out)
    second_run(path, out)
    after = {file.name: file.read_bytes() for file in out.glob("*.tar")}
    assert changed and {name for name in after if after[name] != before[name]} == set(changed)


@pytest.mark.parametrize("template", ["phi", "v0"])
def test_a_system_prompt_an_answer_at_the_start_and_the_order_of_pictures_survive(tmp_path, template):
    names = [f"{i}.png" for i in range(12)]
    write_images(tmp_path, names)
    order = names[::-1]
    turns = [{"from": "gpt", "value": "Hello."}, *conversation("<image>" * 12, "b")]  # `v0` trains the greeting
    path = write_rows(tmp_path, [{"id": "x", "images": order, "system": "Be brief.", "conversations": turns}])
    make_shards(path, tmp_path, tmp_path / "shards")
    options = {"packing": False, "seq_length": 512, "template": template}
    plain, shard = (
        next(make_loader(config(source, **options), micro_batch_size=1)) for source in (path, tmp_path / "shards")
    )
    assert torch.equal(plain.pixel_values_NCHW, shard.pixel_values_NCHW) and len(plain.pixel_values_NCHW) == 12
    assert torch.equal(plain.tokens_BS, shard.tokens_BS)


MEMBERS = ["1.png", "2.png", "10.png"]
ORDERS = {  # the record's names, the members in the tar's order -> the members in the sample's order, or what is wrong
    "by name": (["10.png", "1.png", "2.png"], MEMBERS, ["10.png", "1.png", "2.png"]),
    "by name in a folder": (["a/10.png", "a/1.png"], MEMBERS, ["10.png", "1.png"]),
    "by key and name": (["x.2.png", "x.10.png"], MEMBERS, ["2.png", "10.png"]),
    "twice": (["2.png", "1.png", "2.png"], MEMBERS, ["2.png", "1.png", "2.png"]),
    "one of another name": (["coco/000.jpg"], ["jpg"], ["jpg"]),
    "other names in the tar's order": (["a.jpg", "b.jpg", "c.jpg"], MEMBERS, MEMBERS),
    "other names, unordered": (["a.jpg", "b.jpg", "c.jpg"], ["1.png", "10.png", "2.png"], "not in the order"),
    "one name of several": (["1.png", "b.png", "c.png"], MEMBERS, "'b.png' is not in the shard"),
    "too few": (["a.png", "b.png", "c.png"], MEMBERS[:2], "'a.png' is not in the shard"),
}


@pytest.mark.parametrize("case", ORDERS)
def test_members_come_in_the_records_order_or_the_row_is_bad(case):
    names, members, expected = ORDERS[case]
    turns = conversation("<image>" * len(names), "b")
    sample = parse_record({"image": names, "conversations": turns}, origin="row")
    files = {name: name.encode() for name in members}
    if isinstance(expected, str):
        with pytest.raises(BadSample, match=expected):
            Reader.with_members(sample, files)
    else:
        assert [ref.data.decode() for ref in Reader.with_members(sample, files).images] == expected


def test_a_folder_of_another_source_is_refused(tmp_path):
    path, out = make_set(tmp_path / "raw"), tmp_path / "shards"
    make_shards(path, tmp_path / "raw", out)
    with pytest.raises(DataError, match="holds shards of another source"):
        make_shards(path, tmp_path / "raw", out, rows_per_shard=3)


def test_a_shard_cut_off_on_disk_is_found(tmp_path):
    path, out = make_set(tmp_path / "raw"), tmp_path / "shards"
    make_shards(path, tmp_path / "raw", out, rows_per_shard=9)
    with open(out / "shard-000001.tar", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(DataError, match=r"shard-000001.tar holds .* run the same command again"):
        make_shards(path, tmp_path / "raw", out, rows_per_shard=9)
    assert make_shards(path, tmp_path / "raw", out, rows_per_shard=9)["written"] == 40


def test_bad_rows_stop_it_or_are_listed(tmp_path):
    write_images(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"x")
    bad = [row(1, "gone.png"), row(2, "broken.png"), row(3, "../out.png"), row(4, conversations=[])]
    path = write_rows(tmp_path, [row(0), *bad])
    with pytest.raises(DataError, match=r"rows are bad, more than --max-skip-share 0.0 allows; for example: rows.json"):
        make_shards(path, tmp_path, tmp_path / "a")
    report = make_shards(path, tmp_path, tmp_path / "b", max_skip_share=0.9)
    reasons = {"missing image": 1, "unreadable image": 1, "outside image folder": 1, "no conversation": 1}
    assert report["skipped"] == reasons and report["written"] == 1
    assert any("rows.json row 2, image 'broken.png'" in message for message in report["skipped_rows"])


def test_base64_and_video_become_image_members(tmp_path):
    write_images(tmp_path)
    data = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    frames = [Image.new("RGB", (8, 8), (20 * i, 0, 0)) for i in range(6)]
    frames[0].save(tmp_path / "v.gif", save_all=True, append_images=frames[1:])
    video = {"id": "v", "video": "v.gif", "conversations": conversation("<video>\nWhat?", "red")}
    path = write_rows(tmp_path, [row(0, f"data:image/png;base64,{data}"), video])
    make_shards(path, tmp_path, tmp_path / "shards", video_frames=3)
    with tarfile.open(tmp_path / "shards" / "shard-000000.tar") as tar:
        names = sorted(tar.getnames())
    assert names == [f"00000000{key}" for key in ("0.0.png", "0.json", "1.0.png", "1.1.png", "1.2.png", "1.json")]
    batches = take(make_loader(config(tmp_path / "shards", packing=False), micro_batch_size=1), 2)
    assert sorted(len(batch.pixel_values_NCHW) for batch in batches) == [1, 3]


def test_pictures_beside_the_frames_of_a_video_stay_pictures(tmp_path):
    """A saved conversation about a picture and a video of two frames."""
    write_images(tmp_path)
    talk = conversation("<image><image><image>Which?", "red")
    path = write_rows(tmp_path, [{"id": "t", "image": ["a.png"] * 3, "frames": [0, 2], "conversations": talk}])
    make_shards(path, tmp_path, tmp_path / "shards")
    with tarfile.open(tmp_path / "shards" / "shard-000000.tar") as tar:
        assert json.load(tar.extractfile("000000000.json"))["frames"] == [0, 2]
    (batch,) = take(make_loader(config(tmp_path / "shards", packing=False), micro_batch_size=1), 1)
    assert len(batch.pixel_values_NCHW) == 3


def damage(path: Path, index: int, data: bytes) -> None:
    """Overwrite the header of the index-th member."""
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[index].offset
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("data", [b"\0" * 600, b"\xff" * 3000, b"other/name.json"])
def test_a_damaged_spot_in_a_shard_costs_only_its_samples(tmp_path, data):
    path, out = make_set(tmp_path / "raw", 30), tmp_path / "shards"
    make_shards(path, tmp_path / "raw", out, rows_per_shard=30)
    damage(out / "shard-000000.tar", 20, data)
    with pytest.raises(DataError):
        take(make_loader(config(out, packing=False), micro_batch_size=1), 30)
    loader = make_loader(config(out, packing=False, max_skip_share=0.3), micro_batch_size=1)
    found = set(ids(take(loader, 60)))
    assert 24 <= len(found) < 30 and loader.skipped


def write_tar(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (9, 9)).save(picture, "PNG")
    record = {"id": "x", "image": "png", "conversations": conversation("<image>\nWhy?", "Because.")}
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name in names:
            for extension, data in (("json", json.dumps(record).encode()), ("png", picture.getvalue())):
                entry = tarfile.TarInfo(f"{name}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    from megatron.energon.flavors import BaseWebdatasetFactory

    BaseWebdatasetFactory.prepare_dataset(folder, ["a.tar"], split_parts_ratio=[("train", 1.0)], workers=1)
    (folder / ".nv-meta" / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\nsubflavors: {}\n"
    )
    return folder


def test_hostile_names_in_a_tar_reach_no_file(tmp_path):
    names = ["../../escape", "/absolute", "a/../../b", "sp ace", "ünï", "x" * 90]
    folder = write_tar(tmp_path / "shards", names)
    before = sorted(str(p) for p in tmp_path.parent.rglob("*") if ".moellava_index" not in str(p))
    loader = make_loader(config(folder, packing=False), micro_batch_size=1, cache_folder=tmp_path / ".moellava_index")
    assert len(take(loader, len(names))) == len(names)
    assert sorted(str(p) for p in tmp_path.parent.rglob("*") if ".moellava_index" not in str(p)) == before


def test_a_folder_without_energons_index_says_what_to_do(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"without Energon's .nv-meta; make shards with moellava prepare-data"):
        make_loader(config(tmp_path))


def test_the_command_line_describes_and_converts(tmp_path):
    path = make_set(tmp_path)
    tool = REPO / "tools" / "prepare_data.py"
    assets = ASSETS
    command = [sys.executable, str(tool), "--data", str(path), "--out", str(tmp_path / "out"), "--workers", "1"]
    model = ["--tokenizer", str(assets / "tok_bpe"), "--template", "phi", "--tower", str(assets / "openai/clip-tiny")]
    environment = os.environ | {"PYTHONPATH": str(tool.parents[1])}
    done = subprocess.run([*command, *model, "--seq-length", "256"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "wrote 40 of 40 rows, 26 images, 1 shards" in done.stdout
    found = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert found["samples"] == 40 and 0.8 < found["packed_useful_share"] <= 1  # fewer samples than the packer's buffer
    assert Image.open(tmp_path / "out" / "token_lengths.png").width > 500
    failed = subprocess.run([*command[:3], "gone.json", *command[4:]], capture_output=True, text=True, env=environment)
    assert failed.returncode == 2 and "DataError: data.sources.path=gone.json" in failed.stderr
