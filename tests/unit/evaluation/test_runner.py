"""The runner driven by a small real engine: an oracle that opens the pictures and answers from a table."""

import json
import threading
from dataclasses import replace

import pytest

from megatron_moellava.config import DataError
from megatron_moellava.evaluation.predictions import Place
from megatron_moellava.evaluation.runner import Answer, Options, read_questions
from megatron_moellava.evaluation.tasks import TASKS, get_task
from tests.helpers import evaluation_miniatures as miniatures
from tests.helpers.evaluation_runs import predictions_of, run, write_miniature


class Oracle:
    """Answers a request by the first key of the table that occurs in its text; last asked, first answered."""

    def __init__(self, table, default="yes", stop_after=None):
        self.table, self.default, self.stop_after = table, default, stop_after
        self.asked = []

    def generate(self, requests):
        for number, request in enumerate(reversed(list(requests))):
            if number == self.stop_after:
                raise KeyboardInterrupt
            text = request.turns[-1].text
            assert text.count("<image>") + text.count("<video>") == len(request.images)
            for picture in request.images:
                assert picture.open().mode == "RGB"
            self.asked.append(request)
            yield Answer(
                request_id=request.id,
                text=next((f" {answer}\n" for key, answer in self.table.items() if key in text), self.default),
            )


def test_answers_are_scored_and_written_in_the_order_and_columns_of_the_original(tmp_path):
    miniatures.gqa(tmp_path)
    record = run("gqa", tmp_path, Oracle({"a1": "Yes", "a2": "red.", "a3": "right"}))
    assert record["value"] == pytest.approx(200 / 3)
    assert record["bootstrap"] == {"samples": 50, "unit": "image", "units": 2}
    rows = predictions_of(tmp_path, "gqa")
    assert [row["question_id"] for row in rows] == ["a1", "a2", "a3"]
    assert set(rows[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert rows[0]["prompt"] == "a1?\nAnswer the question using a single word or phrase."
    assert rows[0]["text"] == "Yes"  # stripped
    assert json.loads((tmp_path / "out/gqa/scores.json").read_text())["value"] == record["value"]
    assert not list((tmp_path / "out/gqa").glob("*.part*"))


@pytest.mark.parametrize("name", list(TASKS))
def test_every_benchmark_runs_from_questions_to_record(tmp_path, name):
    write_miniature(name, tmp_path)
    if name == "seed":  # SEED-Bench's picture names have no extension
        for path in (tmp_path / "seed_bench/SEED-Bench-image").iterdir():
            path.rename(path.with_suffix(""))
    engine = Oracle({}, default="A")
    record = run(name, tmp_path, engine)
    assert len(engine.asked) == len(get_task(name).read(tmp_path))
    assert (record["value"] is None) == (name in ("vqav2", "vizwiz", "llava_bench", "mm_vet"))
    assert bool(record.get("submission")) == (get_task(name).submit is not None)


def test_an_interrupted_run_asks_only_what_is_left(tmp_path):
    miniatures.pope(tmp_path)
    whole = run("pope", tmp_path, Oracle({"popular": "no"}))
    (tmp_path / "out").rename(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run("pope", tmp_path, Oracle({"popular": "no"}, stop_after=4))
    part = tmp_path / "out/pope/predictions.part00000.jsonl"
    assert len(part.read_text().splitlines()) == 4
    part.write_bytes(part.read_bytes()[:-7])  # killed within the last row
    engine = Oracle({"popular": "no"})
    assert run("pope", tmp_path, engine) == whole
    assert len(engine.asked) == 3
    assert (tmp_path / "out/pope/predictions.jsonl").read_text() == (
        tmp_path / "whole/pope/predictions.jsonl"
    ).read_text()
    engine = Oracle({})
    assert run("pope", tmp_path, engine) == whole
    assert engine.asked == []


def run_together(name, root, engines, places):
    """One thread per process of a run; their records in order."""
    barrier = threading.Barrier(len(places))
    records = [None] * len(places)

    def work(number):
        place = replace(places[number], barrier=lambda: barrier.wait(timeout=30))
        records[number] = run(name, root, engines[number], place=place)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return records


@pytest.mark.parametrize(
    ("places", "asked"),
    [
        ([Place(rank=0, world_size=2), Place(rank=1, world_size=2)], [3, 3]),
        ([Place(), Place(writes=False)], [6, 6]),  # two halves of one model
        ([Place(rank=rank, world_size=7) for rank in range(7)], [1, 1, 1, 1, 1, 1, 0]),
    ],
)
def test_several_processes_agree_with_one(tmp_path, places, asked):
    miniatures.mme(tmp_path)
    table = {"Is it there": "Yes", "Is it not": "No"}
    alone = run("mme", tmp_path, Oracle(table))
    text = (tmp_path / "out/mme/predictions.jsonl").read_text()
    (tmp_path / "out").rename(tmp_path / "alone")
    engines = [Oracle(table) for _ in places]
    assert run_together("mme", tmp_path, engines, places) == [alone] + [None] * (len(places) - 1)
    assert [len(engine.asked) for engine in engines] == asked
    assert (tmp_path / "out/mme/predictions.jsonl").read_text() == text


def test_a_limited_run_can_be_extended(tmp_path):
    miniatures.gqa(tmp_path)
    record = run("gqa", tmp_path, Oracle({}), options=Options(limit=1, progress=False, bootstrap_samples=2))
    assert (record["count"], record["notes"]) == (1, ["subset: 1 of 3 questions"])
    engine = Oracle({})
    assert run("gqa", tmp_path, engine)["count"] == 3
    assert len(engine.asked) == 2


def test_blank_pictures_keep_their_size_and_lose_their_content(tmp_path):
    miniatures.quickstart(tmp_path)
    task = get_task("quickstart")
    seen = read_questions(task, tmp_path, Options()).chosen[0].picture.open()
    blank = read_questions(task, tmp_path, Options(blank_images=True)).chosen[0].picture.open()
    assert blank.size == seen.size
    assert blank.getcolors() == [(24, (127, 127, 127))]
    assert seen.getcolors() != blank.getcolors()
    record = run("quickstart", tmp_path, Oracle({}), options=Options(blank_images=True, progress=False))
    assert "blank pictures" in record["notes"][-1]


def test_a_missing_picture_names_the_file(tmp_path):
    folder = miniatures.pope(tmp_path)
    (folder / "val2014/2.jpg").unlink()
    with pytest.raises(DataError, match=r"val2014/2\.jpg"):
        run("pope", tmp_path, Oracle({}))


def test_an_engine_that_skips_or_invents_a_request_is_caught(tmp_path):
    miniatures.gqa(tmp_path)

    class Skips:
        def generate(self, requests):
            yield Answer(request_id=requests[0].id, text="x")

    class Invents:
        def generate(self, requests):
            yield Answer(request_id="nobody", text="x")

    with pytest.raises(AssertionError, match="2 of 3 requests unanswered"):
        run("gqa", tmp_path, Skips())
    with pytest.raises(AssertionError, match="'nobody' was not asked"):
        run("gqa", tmp_path, Invents())
