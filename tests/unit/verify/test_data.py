"""The data path against recordings of the original's: its sampler and scorers as they are in tests/golden, its batches and
tokenised prompts put together from the recorded conversations."""

import json
import shutil

import pytest
import torch

from megatron_moellava.verify.data import verify_data
from megatron_moellava.verify.folder import Folder
from megatron_moellava.verify.table import Table
from tests.helpers.paths import GOLDEN

CONVERSATIONS = json.loads((GOLDEN / "data/conversations.json").read_text())


def collated(version: str, names: list[str], max_length: int) -> dict:
    """What the original's collator makes of recorded rows."""
    rows = [CONVERSATIONS["versions"][version][name] for name in names]
    ids, labels, real = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(part) for part in parts], batch_first=True, padding_value=value)
        for parts, value in (
            ([row["input_ids"] for row in rows], 7),
            ([row["labels"] for row in rows], -100),
            ([[1] * len(row["input_ids"]) for row in rows], 0),
        )
    )
    batch = {"input_ids": ids, "labels": labels, "attention_mask": real.bool()}
    batch = {name: value[:, :max_length] for name, value in batch.items()}
    return batch | {"version": version, "rows": names, "max_length": max_length}


def image_rows(version: str) -> dict[str, list[int]]:
    found = CONVERSATIONS["versions"][version].values()
    return {row["prompt"]: row["input_ids"] for row in found if -200 in row.get("input_ids", [])}


@pytest.fixture
def folder(tmp_path):
    """A folder of recordings of the data path."""
    shutil.copytree(GOLDEN / "assets", tmp_path / "assets")
    shutil.copytree(GOLDEN / "data", tmp_path / "data")
    prompts = {"tok_bpe": image_rows("phi"), "tok_spm": image_rows("v1")}
    write(tmp_path, "conversations", CONVERSATIONS | {"tokenizer_image_token": prompts})
    names = ["text_only", "one_image", "two_images", "image_at_end", "text_multi_turn"]
    batches = {
        "phi": collated("phi", names, 2048),
        "v1": collated("v1", names, 2048),
        # Rows with images are cut by the collator, after their labels were made; text rows before.
        "v1 cut": collated("v1", ["one_image", "image_in_middle"], 60),
    }
    torch.save(batches, tmp_path / "data/dataset.pt")
    return tmp_path


def write(folder, name: str, content: dict) -> None:
    (folder / f"data/{name}.json").write_text(json.dumps(content))


def read(folder, name: str) -> dict:
    return json.loads((folder / f"data/{name}.json").read_text())


def table_of(folder) -> Table:
    table = Table()
    verify_data(Folder(folder), table)
    return table


def test_the_originals_data_path_is_ours(folder):
    table = table_of(folder)
    assert table.passes, table.render()
    assert {row.case.split()[0] for row in table.rows} == {"conversations", "dataset", "sampler", "scorers"}
    assert len(table.rows) == 2 + 3 * 3 + 6 + 5 and table.left_out == []


def wrong_id(folder):
    recorded = read(folder, "conversations")
    next(iter(recorded["tokenizer_image_token"]["tok_spm"].values()))[-1] += 1
    write(folder, "conversations", recorded)


def change_batch(folder, name: str, place: tuple[int, int], value):
    recorded = torch.load(folder / "data/dataset.pt")
    recorded["v1"][name][place] = value
    torch.save(recorded, folder / "data/dataset.pt")


def wrong_order(folder):
    recorded = read(folder, "sampler_schedule")
    order = recorded["only_text"]["indices"]
    order[4], order[5] = order[5], order[4]
    write(folder, "sampler_schedule", recorded)


def wrong_score(folder, name: str, answer, value):
    recorded = read(folder, "scoring")
    if name == "textvqa":
        recorded[name][answer]["score"] = value
    else:
        recorded[name][answer] = value
    write(folder, "scoring", recorded)


WRONG = {
    "a token of a prompt": (wrong_id, "conversations", "prompts with images, tok_spm"),
    "a token of a batch": (lambda f: change_batch(f, "input_ids", (0, 5), 9), "dataset v1", "ids"),
    "a label of a batch": (lambda f: change_batch(f, "labels", (0, 5), 9), "dataset v1", "labels"),
    "a masked token": (lambda f: change_batch(f, "attention_mask", (0, 3), False), "dataset v1", "padding"),
    "an order": (wrong_order, "sampler only_text", "order of 31 samples"),
    "a normalised answer": (lambda f: wrong_score(f, "evalai", "5,000", "5,000"), "scorers evalai", "31 answers"),
    "a yes": (lambda f: wrong_score(f, "pope", "NO", "no"), "scorers pope", "17 answers"),
    "a letter": (lambda f: wrong_score(f, "science_qa", "a", "A"), "scorers science_qa", "17 answers"),
    "a score": (lambda f: wrong_score(f, "textvqa", 0, 0.8), "scorers textvqa", "soft accuracy of 7"),
}


@pytest.mark.parametrize("what", WRONG)
def test_one_wrong_number_is_seen_in_its_case(folder, what):
    spoil, case, quantity = WRONG[what]
    spoil(folder)
    failed = {(row.case, row.quantity) for row in table_of(folder).rows if not row.passes}
    assert any(found == case and quantity in name for found, name in failed), failed
    assert {found for found, _ in failed} == {case}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sampler_schedule", {"mixed": {"lengths": [1, 2]}}),
        ("sampler_schedule", []),
        ("scoring", {"evalai": ["a"]}),
        ("scoring", {"bleu": {}}),
        ("conversations", CONVERSATIONS | {"tokenizer_image_token": {"tok_other": {}}}),
    ],
)
def test_a_recording_of_another_form_is_said_to_be_left_out(folder, name, content):
    write(folder, name, content)
    table = table_of(folder)
    assert [name in line and "no case reads it" in line for line in table.left_out] == [True]
