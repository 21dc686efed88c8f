"""Rows of one pass over a data set: dealt to the ranks in turn, each once, and the last again where one is missing."""

import pytest

from megatron_moellava.config import DataError
from megatron_moellava.data.batch import from_wire
from megatron_moellava.training.one_pass import dealt_once, read_together
from tests.helpers import data_files
from tests.helpers.trainers import one_layout


@pytest.fixture(scope="module", autouse=True)
def groups():
    with one_layout():
        yield


def test_every_row_comes_once_and_the_last_fills_up(tmp_path):
    path = data_files.make_set(tmp_path, 7)
    loader = data_files.make_loader(data_files.config(path, packing=False), micro_batch_size=2)
    dealt = list(dealt_once(loader, 5, 2))
    assert [rows for rows, _ in dealt] == [2, 2, 2, 1, 0]
    names = [name for _, delivered in dealt for name in from_wire(delivered["batch"]).sample_ids]
    assert sorted(names[:7]) == [f"id{number}" for number in range(7)]
    assert set(names[7:]) == {names[6]}
    again = [from_wire(delivered["batch"]).sample_ids for _, delivered in dealt_once(loader, 5, 2)]
    assert [name for ids in again for name in ids] == names


def test_a_fault_of_the_reader_names_what_was_read():
    def broken():
        yield 1
        raise DataError("row 3: mend it")

    reader = broken()
    assert read_together(reader, 1, "what") == [1]
    with pytest.raises(DataError, match="what: row 3: mend it"):
        read_together(reader, 1, "what")
    assert read_together(None, 2, "what") == [None, None]
