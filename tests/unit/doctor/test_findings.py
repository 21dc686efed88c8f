"""The page: by part, problems marked, the verdict last."""

from megatron_moellava.doctor.findings import WIDTH, Finding, as_data, page, works

GOOD = Finding(part="machine", name="cores", found="2")
NOTE = Finding(
    part="folder", name="locks", found="missing", meaning="nothing keeps a second job out " * 6, level="note"
)
BAD = Finding(part="machine", name="/dev/shm", found="missing", meaning="use data.num_workers=0", level="problem")


def test_parts_stay_together_and_problems_are_marked_and_counted():
    text = page([GOOD, NOTE, BAD])
    assert text.splitlines()[:3] == [
        "machine",
        "  cores                   2",
        "! /dev/shm                missing: use data.num_workers=0",
    ]
    assert text.index("/dev/shm") < text.index("locks")
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.splitlines()[-1] == "1 problem(s): /dev/shm; runs will not work before they are mended"
    assert page([GOOD, NOTE]).splitlines()[-1] == "no problem found: runs work here"


def test_a_note_is_no_problem():
    assert works([GOOD, NOTE]) and not works([GOOD, BAD])
    data = as_data([BAD])
    assert data["works"] is False and data["findings"][0]["level"] == "problem"
